"""What the search promises, on thousands of simulated devices. Dominance is written out again here, on purpose."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofit.search.controller import MAX_TRIALS, SearchOutcome, SearchSpace, TrialEvent, measure
from autofit.search.facts import Facts
from autofit.search.predict import Predictor
from autofit.space.candidate import KNOBS, LOSSY, Candidate
from autofit.space.ladder import RUNGS
from autofit.trial.result import TrialResult, TrialStatus

from .landscapes import (
    Landscape,
    MemoryStore,
    Thresholds,
    budget_of,
    chain_of,
    default_space,
    exhaustive,
    ignore,
    plausible,
    wild,
)
from .sweep import sweep

seeds = st.integers(0, 2**32)
OFFLOADED = {"none": 0, "checkpoints": 1, "all": 2}


def heavier_or_equal(a: Candidate, b: Candidate) -> bool:
    """In every knob at least as much memory, at equal bits."""
    return (
        a.quantization_bits == b.quantization_bits
        and a.micro_batch_size >= b.micro_batch_size
        and a.max_seq_length >= b.max_seq_length
        and a.lora_rank >= b.lora_rank
        and a.checkpointed_layers <= b.checkpointed_layers
        and OFFLOADED[a.offload_activations] <= OFFLOADED[b.offload_activations]
        and (a.optimizer == b.optimizer or not a.optimizer.startswith("paged"))
    )


def search(space: SearchSpace, landscape: Landscape | Thresholds | Faulty) -> SearchOutcome:
    outcome = measure(space, budget_of(landscape.usable), landscape, MemoryStore(), ignore)
    assert len(landscape.runs) == len(set(landscape.runs)), "a candidate was tried twice"
    assert landscape.runs == [t.candidate for t in outcome.trials]
    assert 1 <= len(outcome.trials) <= MAX_TRIALS
    assert outcome.trials[0].candidate == space.wish
    if outcome.winner is not None:
        assert outcome.winner in outcome.trials
        assert outcome.rung in outcome.trials
        assert outcome.winner.result.status is TrialStatus.FIT
    return outcome


def varied(space: SearchSpace, rng: random.Random) -> SearchSpace:
    """The space under an order, pins, minima and allowed knobs that somebody might ask for."""
    order = rng.sample(list(RUNGS), rng.randint(1, len(RUNGS)))
    limits = replace(
        space.limits,
        pins=frozenset(rng.sample(KNOBS, rng.choice((0, 0, 1, 2)))),
        minima={"max_seq_length": rng.choice((1, 128, 512))} if rng.random() < 0.3 else {},
        allow=frozenset(rng.sample(LOSSY, rng.randint(1, 3))),
        can_page=rng.random() < 0.7,
    )
    return replace(space, limits=limits, order=tuple(order))


@given(seeds, st.booleans())
@settings(max_examples=700, deadline=None)
def test_finds_what_trying_every_rung_finds(seed: int, monotone_bits: bool) -> None:
    space, landscape = wild(random.Random(seed), monotone_bits=monotone_bits)
    outcome = search(space, landscape)
    assert (outcome.rung.candidate if outcome.rung else None) == exhaustive(space, landscape)


@given(seeds)
@settings(max_examples=300, deadline=None)
def test_keeps_to_the_order_the_pins_and_the_minima(seed: int) -> None:
    rng = random.Random(seed)
    space, landscape = wild(rng, monotone_bits=False)
    space = varied(space, rng)
    outcome = search(space, landscape)
    assert (outcome.rung.candidate if outcome.rung else None) == exhaustive(space, landscape)
    wish, moved = space.wish, {RUNGS[name] for name in space.order}
    for trial in outcome.trials:
        c = trial.candidate
        for knob in KNOBS:
            if getattr(c, knob) != getattr(wish, knob):
                assert knob in moved
                assert knob not in space.limits.pins
                assert knob not in LOSSY or knob in space.limits.allow
        assert heavier_or_equal(wish, c.replace(quantization_bits=wish.quantization_bits))
        assert c.max_seq_length >= min(wish.max_seq_length, space.limits.minima.get("max_seq_length", 1))


@given(seeds)
@settings(max_examples=300, deadline=None)
def test_never_tries_what_cannot_fit(seed: int) -> None:
    space, landscape = wild(random.Random(seed), monotone_bits=False)
    trials = search(space, landscape).trials
    for i, later in enumerate(trials):
        for earlier in trials[:i]:
            if earlier.result.status is not TrialStatus.OOM:
                continue
            assert not heavier_or_equal(later.candidate, earlier.candidate)
            if earlier.result.phase == "build":
                same_bits = later.candidate.quantization_bits == earlier.candidate.quantization_bits
                assert not (same_bits and later.candidate.lora_rank >= earlier.candidate.lora_rank)


@given(seeds)
@settings(max_examples=300, deadline=None)
def test_never_settles_below_a_rung_that_should_fit(seed: int) -> None:
    rng = random.Random(seed)
    space, landscape = plausible(rng) if rng.random() < 0.5 else wild(rng, monotone_bits=False)
    outcome = search(space, landscape)
    facts = Facts(landscape.usable)
    for trial in outcome.trials:
        facts.add(trial)
    predictor = Predictor(facts, space.wish, space.limits.checkpointable_layers)
    tried = {t.candidate for t in outcome.trials}
    for above in chain_of(space):
        if outcome.rung is not None and above == outcome.rung.candidate:
            break
        need = predictor.need(above)
        assert above in tried or need is None or need > landscape.usable


@given(seeds)
@settings(max_examples=300, deadline=None)
def test_the_winner_is_the_fastest_measured_at_the_rungs_quality(seed: int) -> None:
    space, landscape = wild(random.Random(seed), monotone_bits=False)
    outcome = search(space, landscape)
    if outcome.winner is None or outcome.rung is None:
        return
    quality = [getattr(outcome.rung.candidate, knob) for knob in LOSSY]
    assert [getattr(outcome.winner.candidate, knob) for knob in LOSSY] == quality
    speeds = [
        landscape.speed(t.candidate)
        for t in outcome.trials
        if t.result.status is TrialStatus.FIT and [getattr(t.candidate, knob) for knob in LOSSY] == quality
    ]
    assert landscape.speed(outcome.winner.candidate) == max(speeds)


def threshold_cases(chain: tuple[Candidate, ...]) -> Iterator[dict[int, Candidate | None]]:
    """Every way in which rungs can fit, when nothing follows across bits."""
    by_bits = {b: [None, *(c for c in chain if c.quantization_bits == b)] for b in (16, 8, 4)}
    for first in by_bits[16]:
        for second in by_bits[8]:
            for third in by_bits[4]:
                yield {16: first, 8: second, 4: third}


@pytest.mark.parametrize("tells", [True, False])
def test_within_the_bound_wherever_the_first_fit_is_and_whatever_is_projected(tells: bool) -> None:
    space = default_space()
    chain = chain_of(space)
    assert len(chain) == 28
    for i, first in enumerate(threshold_cases(chain)):
        landscape = Thresholds(budget_of(10**9).usable_bytes, chain, first, random.Random(i), tells)
        outcome = search(space, landscape)
        expected = next((c for c in chain if landscape.fits(c)), None)
        assert (outcome.rung.candidate if outcome.rung else None) == expected


@pytest.mark.parametrize("order", [("rank", "seq", "bits", "batch"), ("bits", "seq", "rank", "batch", "paging")])
def test_within_the_bound_in_other_orders(order: tuple[str, ...]) -> None:
    space = default_space(order=order)
    chain = chain_of(space)
    for i, first in enumerate(threshold_cases(chain)):
        landscape = Thresholds(10**9, chain, first, random.Random(i))
        outcome = search(space, landscape)
        expected = next((c for c in chain if landscape.fits(c)), None)
        assert (outcome.rung.candidate if outcome.rung else None) == expected


@dataclass
class Faulty:
    """A landscape on which some candidates end otherwise than by fitting or not."""

    landscape: Landscape
    rate: float
    seed: int

    @property
    def usable(self) -> int:
        return self.landscape.usable

    @property
    def runs(self) -> list[Candidate]:
        return self.landscape.runs

    def run(self, c: Candidate) -> TrialResult:
        result = self.landscape.run(c)
        rng = random.Random(f"{self.seed} {c}")
        if rng.random() < self.rate:
            status = rng.choice((TrialStatus.TIMEOUT, TrialStatus.HOST_OOM, TrialStatus.CRASHED))
            return TrialResult(status=status, phase="forward", message=f"died at {rng.random()}")
        return result


@given(seeds, st.sampled_from((0.1, 0.5, 1.0)))
@settings(max_examples=300, deadline=None)
def test_trials_that_fail_otherwise_neither_break_the_bound_nor_win(seed: int, rate: float) -> None:
    space, landscape = wild(random.Random(seed), monotone_bits=False)
    trials = search(space, Faulty(landscape, rate, seed)).trials
    for i, later in enumerate(trials):
        for earlier in trials[:i]:
            if earlier.result.status is TrialStatus.TIMEOUT:
                a, b = later.candidate, earlier.candidate
                heavier = a.micro_batch_size >= b.micro_batch_size and a.max_seq_length >= b.max_seq_length
                same_work = a.replace(micro_batch_size=1, max_seq_length=8) == b.replace(
                    micro_batch_size=1, max_seq_length=8
                )
                assert not (heavier and same_work)


@pytest.mark.parametrize(("messages", "trials"), [(("a\nboom", "b\nboom"), 2), (("boom", "bang"), MAX_TRIALS)])
def test_two_first_crashes_alike_end_the_search(messages: tuple[str, str], trials: int) -> None:
    class Crashing:
        runs: list[Candidate] = []  # noqa: RUF012
        usable = 10**9

        def run(self, c: Candidate) -> TrialResult:
            self.runs.append(c)
            return TrialResult(status=TrialStatus.CRASHED, phase="build", message=messages[len(self.runs) % 2])

    runner = Crashing()
    outcome = measure(default_space(), budget_of(10**9), runner, MemoryStore(), ignore)
    assert len(runner.runs) == trials
    assert outcome.winner is None
    assert outcome.nearest_miss is None


@pytest.mark.parametrize("length", [2048, 2**17])
def test_the_last_trial_is_kept_for_the_last_rung(length: int) -> None:
    space = default_space(length=length, rank=64)
    last = chain_of(space)[-1]

    class OnlyTheLast:
        usable = 10**9
        runs: list[Candidate] = []  # noqa: RUF012

        def run(self, c: Candidate) -> TrialResult:
            self.runs.append(c)
            if c == last:
                return TrialResult(status=TrialStatus.FIT, phase="done", device_bytes=10**8)
            return TrialResult(status=TrialStatus.CRASHED, phase="forward", message=f"at {len(self.runs)}")

    OnlyTheLast.runs = []
    outcome = measure(space, budget_of(10**9), OnlyTheLast(), MemoryStore(), ignore)
    assert outcome.winner is not None
    assert outcome.winner.candidate == last


def roomy(**changes: object) -> Landscape:
    values = {
        "usable": 24 * 10**9,
        "layers": 32,
        "base": {16: 16e9, 8: 9e9, 4: 5.5e9},
        "per_token": 3e6,
        "kept": 0.08,
        "floor": 1e5,
        "rank_bytes": 1e7,
        **changes,
    }
    return Landscape(**values)  # type: ignore[arg-type]


def test_a_wish_that_fits_takes_one_trial() -> None:
    landscape = roomy(usable=10**12)
    outcome = search(default_space(), landscape)
    assert len(outcome.trials) == 1
    assert outcome.winner is outcome.rung is outcome.trials[0]


def test_grows_back_what_was_given_up_before_the_bits() -> None:
    landscape = roomy(usable=15 * 10**9, per_token=2e6)
    outcome = search(default_space(), landscape)
    assert outcome.rung is not None
    assert outcome.winner is not None
    # Going from 16 to 4 bits the ladder had spent batch, checkpointing and paging; most of it comes back.
    assert outcome.rung.candidate.quantization_bits == outcome.winner.candidate.quantization_bits < 16
    assert outcome.rung.candidate.checkpointed_layers == 32
    assert outcome.winner.candidate.checkpointed_layers < 16
    assert landscape.speed(outcome.winner.candidate) > 1.1 * landscape.speed(outcome.rung.candidate)


def test_nothing_fits_names_the_nearest_miss() -> None:
    landscape = roomy(usable=10**9)
    outcome = search(default_space(), landscape)
    assert outcome.winner is None
    assert outcome.rung is None
    assert outcome.nearest_miss is not None


def test_nearest_miss_is_the_one_that_needs_least() -> None:
    # 8 bits need least here, and the last rung more.
    landscape = roomy(usable=8 * 10**9, base={16: 7e9, 8: 7.9e9, 4: 7.99e9}, rank_bytes=1e6, floor=1e6)
    outcome = search(default_space(), landscape)
    if outcome.winner is None:
        assert outcome.nearest_miss is not None
        needs = [landscape.need(t.candidate) for t in outcome.trials]
        assert landscape.need(outcome.nearest_miss.candidate) == min(needs)
        assert outcome.nearest_miss_bytes == min(needs)


def test_tells_what_it_does() -> None:
    events: list[TrialEvent] = []
    outcome = measure(default_space(), budget_of(24 * 10**9), roomy(), MemoryStore(), events.append)
    assert [e.kind for e in events] == ["start", "end"] * len(outcome.trials)
    assert [e.result for e in events[1::2]] == [t.result for t in outcome.trials]
    assert all(e.result is None and e.reason for e in events[::2])


def test_an_interrupted_trial_is_as_if_it_had_not_begun() -> None:
    class Interrupted:
        def run(self, c: Candidate) -> TrialResult:
            raise KeyboardInterrupt

    store = MemoryStore()
    with pytest.raises(KeyboardInterrupt):
        measure(default_space(), budget_of(10**9), Interrupted(), store, ignore)
    assert not store.running
    assert not store.trials


def test_typically_four_trials() -> None:
    tally = sweep("plausible", 250)
    total = sum(tally.trials.values())
    assert sum(n for t, n in tally.trials.items() if t <= 4) >= 0.8 * total
    assert tally.rungs_as_exhaustive == total
    assert tally.growths_that_fit >= 0.7 * tally.growths
