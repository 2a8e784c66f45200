"""What a plan chooses from estimates: whatever they say, it fits, and nothing in its rung that fits is faster."""

import json

from hypothesis import given
from hypothesis import strategies as st

from autofit.search.outcome import SearchSpace
from autofit.search.plan import Estimated, Plan, make_plan, rank_fitting, why_nothing_fits
from autofit.space.budget import MemoryBudget
from autofit.space.candidate import LOSSY, Candidate
from autofit.space.cards import CARDS
from autofit.space.ladder import DEFAULT_ORDER, Limits
from autofit.space.plan_space import frontier_space, plan_rungs
from autofit.space.target import facts_of

WISH = Candidate(micro_batch_size=8, max_seq_length=1024, accumulates=True)
LIMITS = Limits(global_batch_size=8, checkpointable_layers=8, can_page=True)
SPACE = [c for rung in plan_rungs(WISH, LIMITS, DEFAULT_ORDER) for c in rung]
DEVICE = facts_of(CARDS["rtx-4090"])
GB = 10**9


def estimated(candidate, need, speed, bracket=None, weights=0):
    return Estimated(
        candidate=candidate,
        peak_allocated_bytes=need // 2,
        peak_reserved_bytes=need // 2,
        device_bytes=need,
        tokens_per_second=speed,
        breakdown_bytes={"weights": weights, "activations": need - weights},
        peak_phase="backward of layer 0",
        bracket=bracket,
    )


def plausible(candidate):
    """A smooth landscape: more rows need more, checkpointing and offloading need less and cost time."""
    rows, share = candidate.micro_batch_size, candidate.checkpointed_layers / 8
    tokens = rows * candidate.max_seq_length
    kept = (
        tokens * 10**6 * (1 - 0.9 * share) * {"none": 1, "checkpoints": 0.8, "all": 0.4}[candidate.offload_activations]
    )
    speed = 1000.0 * (1 - 0.3 * share) * {"none": 1, "checkpoints": 0.9, "all": 0.5}[candidate.offload_activations]
    return estimated(candidate, int(candidate.quantization_bits / 16 * GB + kept), speed)


def plan_of(estimates, usable, frontier=(), cheapest=None):
    answer = {
        "estimates": [e.to_json() for e in estimates],
        "failed": [],
        "frontier": [e.to_json() for e in frontier],
        "cheapest": cheapest,
    }
    return make_plan(WISH, MemoryBudget(total_bytes=usable), DEVICE, json.loads(json.dumps(answer)))


def lossy(candidate):
    return tuple(getattr(candidate, knob) for knob in LOSSY)


@st.composite
def landscapes(draw):
    """Estimates without rhyme or reason, some with a bracket, some without a speed."""
    places = sorted(draw(st.sets(st.integers(0, len(SPACE) - 1), min_size=1, max_size=12)))
    known = draw(st.booleans())
    found = []
    for place in places:
        need, above, speed = draw(st.tuples(st.integers(1, 100), st.none() | st.integers(0, 20), st.integers(1, 50)))
        bracket = None if above is None else (need // 2, need // 2 + above)
        found.append(estimated(SPACE[place], need, float(speed) if known else None, bracket))
    return found


@given(landscapes(), st.integers(1, 110))
def test_the_best_fits_and_nothing_in_its_rung_that_fits_is_faster(estimates, usable):
    plan = plan_of(estimates, usable)
    fits = [e for e in estimates if e.needed_bytes <= usable]
    if not fits:
        assert plan.best is None
        assert plan.fitting == ()
        assert plan.nearest_miss.needed_bytes == min(e.needed_bytes for e in estimates)
        return
    best = plan.of(plan.best)
    assert best.needed_bytes <= usable
    # Estimates come rung by rung: the first that fits says how much of the result is given up.
    assert lossy(plan.best) == lossy(fits[0].candidate)
    rung = [e for e in fits if lossy(e.candidate) == lossy(plan.best)]
    assert best.tokens_per_second == max((e.tokens_per_second for e in rung), key=lambda s: s or 0)
    assert sorted(map(str, plan.fitting)) == sorted(map(str, rung))
    speeds = [e.tokens_per_second or 0 for e in plan.fitting]
    assert speeds == sorted(speeds, reverse=True)
    assert plan.nearest_miss is None


@given(landscapes(), st.integers(1, 110), st.integers(1, 10))
def test_the_shortlist_begins_with_the_best_and_each_next_needs_less(estimates, usable, count):
    plan = plan_of(estimates, usable)
    short = plan.shortlist(count)
    assert len(short) <= count
    assert [e.candidate for e in short[:1]] == ([plan.best] if plan.best else [])
    needs = [e.needed_bytes for e in short]
    assert needs == sorted(set(needs), reverse=True)


def test_nothing_lossy_is_given_up_while_something_lossless_fits():
    estimates = [plausible(c) for c in SPACE]
    for usable in (12 * GB, 5 * GB, 2 * GB, int(1.2 * GB)):
        plan = plan_of(estimates, usable)
        assert lossy(plan.best) == lossy(WISH)
        assert plan.to_json()["given_up"] == []
    plan = plan_of(estimates, int(0.9 * GB))
    assert plan.to_json()["given_up"] == ["quantization_bits"]
    assert plan.best.quantization_bits == 8


def test_without_speeds_what_costs_least_time_is_taken():
    estimates = [estimated(e.candidate, e.needed_bytes, None) for e in map(plausible, SPACE)]
    assert plan_of(estimates, 20 * GB).best == WISH
    tight = plan_of(estimates, 4 * GB).best
    assert (tight.checkpointed_layers, tight.offload_activations, tight.optimizer) == (0, "none", "adamw_torch")
    assert tight.micro_batch_size == 2


@given(st.permutations(SPACE[:20]))
def test_of_equally_fast_ones_the_order_of_estimates_does_not_matter(order):
    same = [estimated(c, 5, 10.0) for c in order]
    assert rank_fitting(same, WISH, 10)[0].candidate == WISH


def test_the_frontier_is_the_largest_micro_batch_at_each_length():
    points = [plausible(c) for c in frontier_space(WISH, LIMITS, DEFAULT_ORDER, 2048)]
    frontier = plan_of([plausible(WISH)], int(3.1 * GB), points).frontier
    assert [(p.checkpointed_layers, p.max_seq_length, p.rows) for p in frontier] == [
        (0, 512, 4),
        (0, 1024, 2),
        (0, 2048, 1),
        (8, 512, 8),
        (8, 1024, 8),
        (8, 2048, 8),
    ]
    tight = plan_of([plausible(WISH)], int(1.3 * GB), points).frontier
    assert [p.rows for p in tight] == [None, None, None, 4, 2, 1]


def test_where_nothing_fits_one_line_says_what_came_nearest_and_what_would_do():
    cheapest = {"card": "rtx-3060", "estimate": plausible(WISH).to_json()}
    plan = plan_of([plausible(c) for c in SPACE], 10**6, cheapest=cheapest)
    space = SearchSpace(wish=WISH, limits=Limits(**{**vars(LIMITS), "pins": frozenset({"lora_rank"})}))
    text = why_nothing_fits(plan, space)
    assert "\n" not in text
    assert "4 bits" in text
    assert "nearest miss" in text
    assert "free lora_rank" in text
    assert "use rtx-3060" in text
    # No other knob makes room for weights that do not fit.
    heavy = [estimated(WISH.replace(quantization_bits=4), 5 * GB, 1.0, weights=4 * GB)]
    assert "free" not in why_nothing_fits(plan_of(heavy, GB), space)


def test_a_plan_is_json():
    plan = plan_of(
        [plausible(c) for c in SPACE], 5 * GB, cheapest={"card": "t4", "estimate": plausible(WISH).to_json()}
    )
    document = json.loads(json.dumps(plan.to_json()))
    assert document["best"]["candidate"] == plan.best.to_json()
    assert document["cheapest_card"] == "t4"
    assert len(document["alternatives"]) == len(plan.alternatives)
    assert isinstance(plan, Plan)
