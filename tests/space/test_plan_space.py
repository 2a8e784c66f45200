"""The space of a plan: in the order that the user gave, everything that makes sense, nothing that may not be."""

import json

from hypothesis import given
from hypothesis import strategies as st

from autofit.space.candidate import KNOBS, LOSSLESS, LOSSY, Candidate
from autofit.space.facts import DeviceFacts
from autofit.space.ladder import DEFAULT_ORDER, MINIMA, RUNGS, Limits, ladder
from autofit.space.plan_request import PlanRequest
from autofit.space.plan_space import frontier_space, least_memory, plan_rungs, plan_space
from autofit.space.source import ModelSource

WISH = Candidate(micro_batch_size=16, max_seq_length=2048, quantization_bits=4, accumulates=True)
LIMITS = Limits(global_batch_size=16, checkpointable_layers=32, can_page=True)


@st.composite
def spaces(draw):
    batch = draw(st.integers(1, 64))
    layers = draw(st.integers(0, 48))
    wish = Candidate(
        micro_batch_size=draw(st.integers(1, batch)),
        max_seq_length=draw(st.integers(8, 5000)),
        quantization_bits=draw(st.sampled_from((16, 8, 4))),
        lora_rank=draw(st.sampled_from((4, 16, 64))),
        checkpointed_layers=draw(st.integers(0, layers)),
        offload_activations=draw(st.sampled_from(("none", "all"))),
        optimizer=draw(st.sampled_from(("adamw_torch", "adamw_8bit", "paged_adamw_8bit"))),
    )
    limits = Limits(
        global_batch_size=batch,
        checkpointable_layers=layers,
        can_page=draw(st.booleans()),
        can_quantize=draw(st.booleans()),
        pins=draw(st.frozensets(st.sampled_from(KNOBS))),
        minima={"max_seq_length": draw(st.sampled_from((64, 1024)))},
        allow=draw(st.frozensets(st.sampled_from(LOSSY))),
    )
    order = tuple(draw(st.permutations(DEFAULT_ORDER)))[: draw(st.integers(1, len(DEFAULT_ORDER)))]
    return wish, limits, order


def lossy(candidate):
    return tuple(getattr(candidate, knob) for knob in LOSSY)


@given(spaces())
def test_a_space_keeps_to_the_users_limits(space):
    wish, limits, order = space
    candidates = plan_space(wish, limits, order)
    assert wish in candidates
    assert len(set(candidates)) == len(candidates) <= 1000
    movable = {RUNGS[name] for name in order} - limits.pins - (set(LOSSY) - limits.allow)
    for candidate in candidates:
        moved = {knob for knob in KNOBS if getattr(candidate, knob) != getattr(wish, knob)}
        assert moved <= movable
        for knob in moved & set(MINIMA):
            assert getattr(candidate, knob) >= max(MINIMA[knob], limits.minima.get(knob, 0))
        assert candidate.micro_batch_size <= wish.micro_batch_size
        assert candidate.checkpointed_layers <= limits.checkpointable_layers


@given(spaces())
def test_a_rung_has_one_choice_of_lossy_values_and_they_come_as_on_the_ladder(space):
    wish, limits, order = space
    rungs = plan_rungs(wish, limits, order)
    assert rungs[0][0].replace(**{k: getattr(wish, k) for k in LOSSLESS}) == wish
    assert all(len({lossy(c) for c in rung}) == 1 for rung in rungs)
    ladders = list(dict.fromkeys(lossy(c) for c in ladder(wish, limits, order)))
    assert list(dict.fromkeys(lossy(rung[0]) for rung in rungs)) == ladders


def test_the_default_space_is_some_hundred_with_offloading_where_the_order_has_it():
    as_asked, offloading, *_ = plan_rungs(WISH, LIMITS, DEFAULT_ORDER)
    assert {c.offload_activations for c in as_asked} == {"none"}
    assert {c.offload_activations for c in offloading} == {"checkpoints", "all"}
    assert {c.checkpointed_layers for c in as_asked} == set(range(0, 33, 4))
    assert {c.micro_batch_size for c in as_asked} == {16, 8, 4, 2, 1}
    assert "paged_adamw_32bit" in {c.optimizer for c in as_asked}
    assert 300 < len(plan_space(WISH, LIMITS, DEFAULT_ORDER)) <= 500
    first = ("offloading", "batch", "bits")
    wish = WISH.replace(quantization_bits=16)
    assert {c.offload_activations for c in plan_rungs(wish, LIMITS, first)[0]} == {"none", "all"}


def test_what_needs_least_gives_up_nothing_that_changes_the_result():
    wish = WISH.replace(quantization_bits=16)
    least = least_memory(wish, LIMITS, DEFAULT_ORDER)
    assert {lossy(c) for c in least} == {lossy(wish)}
    assert {(c.micro_batch_size, c.checkpointed_layers) for c in least} == {(1, 32)}
    # At 16 bits the order gives up bits before it offloads; at 4 there are none left to give up.
    assert {c.offload_activations for c in least} == {"none"}
    assert {c.offload_activations for c in least_memory(WISH, LIMITS, DEFAULT_ORDER)} == {"none", "checkpoints"}


def test_a_frontier_spans_lengths_up_to_the_models_positions():
    points = frontier_space(WISH, LIMITS, DEFAULT_ORDER, 4096)
    assert {c.max_seq_length for c in points} == {512, 1024, 2048, 4096}
    assert {c.checkpointed_layers for c in points} == {0, 32}
    assert {c.micro_batch_size for c in points} == {1, 2, 4, 8, 16}
    pinned = Limits(global_batch_size=16, checkpointable_layers=32, can_page=True, pins=frozenset({"micro_batch_size"}))
    assert {c.micro_batch_size for c in frontier_space(WISH, pinned, DEFAULT_ORDER, 4096)} == {16}


@given(spaces(), st.none() | st.integers(8, 9999), st.booleans())
def test_a_request_survives_json(space, longest, own_dtype):
    wish, limits, order = space
    request = PlanRequest(
        source=ModelSource(model="llama-3-8b", random_weights=True),
        device=DeviceFacts(type="cuda", name="t4", total_bytes=10**9, compute_capability=(7, 5)),
        wish=wish,
        limits=limits,
        order=order,
        usable_bytes=10**9,
        longest=longest,
        own_dtype=own_dtype,
    )
    assert PlanRequest.from_json(json.loads(json.dumps(request.to_json()))) == request


def test_the_frontier_knows_no_pace():
    paced = WISH.replace(pace_length=WISH.max_seq_length // 4)
    assert frontier_space(paced, LIMITS, DEFAULT_ORDER, 8192) == frontier_space(WISH, LIMITS, DEFAULT_ORDER, 8192)
