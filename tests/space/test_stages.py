"""The stages hold the whole space, each thing that changes the result given up only after all that does not."""

import random

from hypothesis import given
from hypothesis import strategies as st

from autofit.space.candidate import LOSSLESS, LOSSY, Candidate
from autofit.space.ladder import RUNGS, Limits, ladder
from autofit.space.stages import stages

WISH = Candidate(micro_batch_size=16, max_seq_length=2048)
LIMITS = Limits(global_batch_size=16, checkpointable_layers=32, can_page=True)


def test_the_first_stage_gives_up_nothing_that_changes_the_result_and_starts_with_the_wish():
    first = stages(WISH, LIMITS)[0]
    assert first.candidates[0] == WISH
    assert all(getattr(c, knob) == getattr(WISH, knob) for c in first.candidates for knob in LOSSY)
    assert len(first.candidates) == 7 * 9 * 2  # rows, eighths of the layers, paged or not
    assert first.lightest == WISH.replace(micro_batch_size=1, checkpointed_layers=32, optimizer="paged_adamw_32bit")


def test_fewer_rows_are_given_up_before_layers_are_recomputed():
    first = stages(WISH, LIMITS)[0]
    assert [c.micro_batch_size for c in first.candidates[:8]] == [16, 8, 6, 4, 3, 2, 1, 16]
    assert [c.checkpointed_layers for c in first.candidates[:8]] == [0] * 7 + [4]


@given(st.integers(0, 2**32))
def test_every_candidate_once_and_all_of_the_ladder_among_them(seed):
    rng = random.Random(seed)
    order = tuple(rng.sample(list(RUNGS), rng.randint(1, len(RUNGS))))
    limits = Limits(
        global_batch_size=rng.choice((1, 4, 16)),
        checkpointable_layers=rng.choice((0, 1, 4, 32)),
        can_page=rng.random() < 0.5,
        pins=frozenset(rng.sample(list(RUNGS.values()), rng.choice((0, 1, 2)))),
        allow=frozenset(rng.sample(LOSSY, rng.randint(1, 3))),
    )
    wish = WISH.replace(micro_batch_size=limits.global_batch_size)
    found = stages(wish, limits, order)
    everything = [c for stage in found for c in stage.candidates]
    assert len(everything) == len(set(everything))
    quarters = {0, limits.checkpointable_layers // 2, limits.checkpointable_layers}
    assert {c for c in ladder(wish, limits, order) if c.checkpointed_layers in quarters} <= set(everything)
    moved = {RUNGS[name] for name in order} - limits.pins
    for c in everything:
        assert all(getattr(c, knob) == getattr(wish, knob) for knob in (*LOSSLESS, *LOSSY) if knob not in moved)
    for stage in found:
        assert len({tuple(getattr(c, knob) for knob in LOSSY) for c in stage.candidates}) == 1
        assert stage.lightest in everything
