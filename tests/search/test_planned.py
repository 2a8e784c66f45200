"""What the planned search promises, on simulated devices whose needs the estimates know well, roughly or not at all."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofit.search.attempts import MAX_TRIALS
from autofit.search.forecast import Prediction, prediction_of
from autofit.search.outcome import SearchOutcome, SearchSpace, TrialEvent
from autofit.search.planned import NoForecast, plan_and_probe
from autofit.space.candidate import LOSSY, OFFLOADING, Candidate
from autofit.space.plan_space import plan_rungs
from autofit.trial.result import TrialResult, TrialStatus

from .landscapes import Landscape, MemoryStore, budget_of, default_space, ignore, plausible, wild

seeds = st.integers(0, 2**32)
GB = 10**9


@dataclass
class Estimates:
    """Estimates of a landscape: `need` says what for a candidate's true bytes; speeds are true up to a ratio."""

    landscape: Landscape
    need: Callable[[Candidate, int], float] = lambda _, exact: exact
    speeds: bool = True
    ratio: float = 1.0
    fails: Callable[[Candidate], bool] = lambda _: False
    asked: list[Candidate] = field(default_factory=list)

    def predict(self, candidates: Sequence[Candidate]) -> list[Prediction | str]:
        self.asked += candidates
        return [self._answer(c) for c in candidates]

    def _answer(self, c: Candidate) -> Prediction | str:
        if self.fails(c):
            return "cannot be traced"
        speed = self.landscape.speed(c) * self.ratio if self.speeds else None
        return Prediction(device_bytes=int(self.need(c, self.landscape.need(c))), tokens_per_second=speed)


def search(space: SearchSpace, landscape: Landscape, estimates: Estimates, runner: object = None) -> SearchOutcome:
    outcome = plan_and_probe(space, budget_of(landscape.usable), estimates, runner or landscape, MemoryStore(), ignore)
    tried = [t.candidate for t in outcome.trials]
    assert landscape.runs == tried
    assert len(tried) == len(set(tried)), "a candidate was tried twice"
    assert 1 <= len(tried) <= MAX_TRIALS
    if outcome.winner is not None:
        assert outcome.winner in outcome.trials
        assert outcome.winner.result.status is TrialStatus.FIT
    return outcome


def first_rung_that_fits(space: SearchSpace, landscape: Landscape) -> list[Candidate] | None:
    """By trying everything: the candidates that fit in the first rung that has some."""
    for rung in plan_rungs(space.wish, space.limits, space.order):
        fitting = [c for c in rung if landscape.need(c) <= landscape.usable]
        if fitting:
            return fitting
    return None


def lossy(candidate: Candidate) -> list[object]:
    return [getattr(candidate, knob) for knob in LOSSY]


@given(seeds)
@settings(max_examples=150, deadline=None)
def test_exact_estimates_take_one_trial_and_choose_the_fastest(seed: int) -> None:
    space, landscape = plausible(random.Random(seed))
    outcome = search(space, landscape, Estimates(landscape))
    fitting = first_rung_that_fits(space, landscape)
    assert len(outcome.trials) == 1
    if fitting is None:
        assert outcome.winner is None
        return
    assert outcome.winner is not None
    assert outcome.winner.candidate in fitting
    assert landscape.speed(outcome.winner.candidate) >= 0.999999 * max(map(landscape.speed, fitting))
    assert outcome.winner.predicted_bytes == outcome.winner.result.device_bytes


def off_by_percents(rng: random.Random) -> tuple[SearchSpace, Landscape, Estimates]:
    space, landscape = plausible(rng)
    error = rng.uniform(-0.03, 0.05) * landscape.usable
    ratio = rng.uniform(0.6, 1.6)
    return space, landscape, Estimates(landscape, need=lambda _, exact: exact - error, ratio=ratio)


@given(seeds)
@settings(max_examples=300, deadline=None)
def test_a_constant_error_of_a_few_percents_is_corrected(seed: int) -> None:
    space, landscape, estimates = off_by_percents(random.Random(seed))
    outcome = search(space, landscape, estimates)
    fitting = first_rung_that_fits(space, landscape)
    assert len(outcome.trials) <= 5  # seldom more than two: see below
    if fitting is None:
        assert outcome.winner is None
        return
    assert outcome.winner is not None
    assert outcome.winner.candidate in fitting
    assert landscape.speed(outcome.winner.candidate) >= max(map(landscape.speed, fitting)) / 1.0501


def test_typically_one_trial_sometimes_two() -> None:
    tally: Counter[int] = Counter()
    for seed in range(300):
        space, landscape, estimates = off_by_percents(random.Random(seed))
        tally[len(search(space, landscape, estimates).trials)] += 1
    assert tally[1] >= 0.8 * tally.total()
    assert tally[1] + tally[2] >= 0.97 * tally.total()


@given(seeds, st.booleans())
@settings(max_examples=400, deadline=None)
def test_wild_estimates_neither_break_the_bound_nor_give_up_what_was_measured_to_fit(seed: int, speeds: bool) -> None:
    rng = random.Random(seed)
    space, landscape = wild(rng, monotone_bits=False)
    spread = rng.choice((0.02, 0.3, 2.0))

    def guess(c: Candidate, exact: int) -> float:
        return exact * 2 ** random.Random(f"{seed} {c}").uniform(-spread, spread)

    outcome = search(space, landscape, Estimates(landscape, need=guess, speeds=speeds))
    rungs = plan_rungs(space.wish, space.limits, space.order)
    fits = [t for t in outcome.trials if t.result.status is TrialStatus.FIT]
    assert (outcome.winner is None) == (not fits)
    if outcome.winner is not None:
        best = min(rung_of(rungs, t.candidate) for t in fits)
        assert lossy(outcome.winner.candidate) == lossy(rungs[best][0])
        same = [t for t in fits if lossy(t.candidate) == lossy(outcome.winner.candidate)]
        assert outcome.winner.result.tokens_per_second == max(t.result.tokens_per_second for t in same)


def rung_of(rungs: list[list[Candidate]], candidate: Candidate) -> int:
    return next(i for i, rung in enumerate(rungs) if candidate in rung)


@given(seeds)
@settings(max_examples=200, deadline=None)
def test_without_speeds_the_order_of_the_ladder_decides(seed: int) -> None:
    space, landscape = plausible(random.Random(seed))
    outcome = search(space, landscape, Estimates(landscape, speeds=False))
    fitting = first_rung_that_fits(space, landscape)
    assert len(outcome.trials) == 1
    if fitting is not None:
        assert outcome.winner is not None
        given_up = [
            (OFFLOADING.index(c.offload_activations), c.optimizer, c.checkpointed_layers, -c.micro_batch_size)
            for c in fitting
        ]
        least = fitting[given_up.index(min(given_up))]
        assert outcome.winner.candidate == least


def test_a_wish_that_fits_is_the_only_thing_estimated() -> None:
    landscape = roomy(usable=10**12)
    estimates = Estimates(landscape)
    outcome = search(default_space(), landscape, estimates)
    assert estimates.asked == [default_space().wish]
    assert outcome.winner is not None
    assert outcome.winner.candidate == default_space().wish


def test_an_estimate_too_low_by_far_is_corrected_without_a_projection() -> None:
    landscape = roomy(reports="nothing")
    outcome = search(default_space(), landscape, Estimates(landscape, need=lambda _, exact: 0.8 * exact))
    assert outcome.winner is not None
    assert len(outcome.trials) <= 6


def test_nothing_fits_is_proven_by_the_trial_that_needs_least() -> None:
    landscape = roomy(usable=2 * GB)
    space = default_space()
    outcome = search(space, landscape, Estimates(landscape))
    assert outcome.winner is None
    assert [t.candidate for t in outcome.trials] == [plan_rungs(space.wish, space.limits, space.order)[-1][-1]]
    assert outcome.nearest_miss is outcome.trials[0]
    assert outcome.nearest_miss_bytes == landscape.need(outcome.trials[0].candidate)


def test_what_was_thought_not_to_fit_and_does_is_found() -> None:
    landscape = roomy(usable=24 * GB)
    outcome = search(default_space(), landscape, Estimates(landscape, need=lambda _, exact: exact + 30 * GB))
    assert outcome.winner is not None
    assert lossy(outcome.winner.candidate) == lossy(default_space().wish)


def test_candidates_without_an_estimate_are_passed_over() -> None:
    landscape = roomy(usable=24 * GB)
    outcome = search(default_space(), landscape, Estimates(landscape, fails=lambda c: c.micro_batch_size > 2))
    assert outcome.winner is not None
    assert all(t.candidate.micro_batch_size <= 2 for t in outcome.trials)


def test_a_model_without_any_estimate_is_said_to_have_none() -> None:
    landscape = roomy()
    with pytest.raises(NoForecast, match="cannot be traced"):
        search(default_space(), landscape, Estimates(landscape, fails=lambda _: True))
    assert landscape.runs == []


@given(seeds, st.sampled_from((0.1, 0.5, 1.0)))
@settings(max_examples=150, deadline=None)
def test_trials_that_end_otherwise_neither_break_the_bound_nor_win(seed: int, rate: float) -> None:
    space, landscape = wild(random.Random(seed), monotone_bits=False)

    class Faulty:
        def run(self, c: Candidate) -> TrialResult:
            result = landscape.run(c)
            rng = random.Random(f"{seed} {c}")
            if rng.random() < rate:
                status = rng.choice((TrialStatus.TIMEOUT, TrialStatus.HOST_OOM, TrialStatus.CRASHED))
                return TrialResult(status=status, phase="forward", message=f"died at {rng.random()}")
            return result

    search(space, landscape, Estimates(landscape), Faulty())


def test_tells_what_it_predicts_before_it_measures() -> None:
    events: list[TrialEvent] = []
    landscape = roomy()
    outcome = plan_and_probe(
        default_space(), budget_of(landscape.usable), Estimates(landscape), landscape, MemoryStore(), events.append
    )
    assert [e.kind for e in events] == ["start", "end"] * len(outcome.trials)
    assert all(e.predicted_bytes and e.reason for e in events)
    assert [e.predicted_bytes for e in events[1::2]] == [t.predicted_bytes for t in outcome.trials]


def test_an_interrupted_trial_is_as_if_it_had_not_begun() -> None:
    class Interrupted:
        def run(self, c: Candidate) -> TrialResult:
            raise KeyboardInterrupt

    store = MemoryStore()
    with pytest.raises(KeyboardInterrupt):
        plan_and_probe(default_space(), budget_of(GB), Estimates(roomy()), Interrupted(), store, ignore)
    assert not store.running
    assert not store.trials


def test_a_bracket_is_predicted_by_its_upper_end() -> None:
    estimate = {"device_bytes": 90, "peak_allocated_bytes": 70, "bracket": [60, 75], "tokens_per_second": None}
    assert prediction_of(estimate) == Prediction(device_bytes=95)
    assert prediction_of({**estimate, "bracket": None}) == Prediction(device_bytes=90)
    assert prediction_of({"error": "no"}) == "no"


def roomy(**changes: object) -> Landscape:
    values = {
        "usable": 24 * GB,
        "layers": 32,
        "base": {16: 16e9, 8: 9e9, 4: 5.5e9},
        "per_token": 3e6,
        "kept": 0.08,
        "floor": 1e5,
        "rank_bytes": 1e7,
        **changes,
    }
    return Landscape(**values)  # type: ignore[arg-type]
