"""The plan: what is chosen from estimates alone, before anything is downloaded or run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from autofit.search.fit_report import GivenUp, given_up, held_knobs
from autofit.search.outcome import SearchSpace
from autofit.space.budget import MemoryBudget
from autofit.space.candidate import LOSSY, OFFLOADING, Candidate
from autofit.space.facts import DeviceFacts
from autofit.space.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class Estimated:
    """A candidate and what `memory.estimate` says of it. Sizes in bytes.

    Attributes:
        peak_allocated_bytes, peak_reserved_bytes, device_bytes: as in a `TrialResult`, predicted.
        tokens_per_second: padded tokens of a micro-batch; None on a CPU.
        breakdown_bytes: at the moment of the peak; adds up to `device_bytes`.
        peak_phase: where in the step the peak is.
        paged_bytes: optimizer states that may leave the device.
        bracket: lowest and highest `peak_allocated_bytes`, only where values decide that nobody has.
    """

    candidate: Candidate
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    device_bytes: int
    tokens_per_second: float | None
    breakdown_bytes: dict[str, int]
    peak_phase: str
    paged_bytes: int = 0
    bracket: tuple[int, int] | None = None

    @property
    def needed_bytes(self) -> int:
        """What is held against the budget: `device_bytes`, at the higher end of the bracket."""
        return self.device_bytes + (max(0, self.bracket[1] - self.peak_allocated_bytes) if self.bracket else 0)

    @property
    def static_bytes(self) -> int:
        """What no batch, length, rank or checkpointing makes smaller: the weights, and the context."""
        return self.breakdown_bytes.get("weights", 0) + self.breakdown_bytes.get("context", 0)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; `from_json` is its inverse."""
        return {**asdict(self), "candidate": self.candidate.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Estimated:
        bracket = data["bracket"]
        parts = {
            "candidate": Candidate.from_json(data["candidate"]),
            "bracket": None if bracket is None else (bracket[0], bracket[1]),
        }
        return cls(**{**data, **parts})


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """The largest micro-batch predicted to fit at a length, with so many layers checkpointed; None where none does."""

    max_seq_length: int
    checkpointed_layers: int
    rows: int | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What fits, going by estimates.

    Attributes:
        best: the fastest that is predicted to fit with as little as possible given up that changes the result.
        alternatives: the others that fit with the same lossy knobs, fastest first.
        estimates: every candidate that was estimated, rung by rung; the space beyond the rung of `best` was not
            looked at.
        failed: candidates that cannot be estimated, and why.
        nearest_miss: where nothing fits, what needs least.
        frontier: by layers checkpointed, then length, ascending; empty where none was asked for.
        cheapest_card: the card that asks least of a purse and runs the wish with its result unchanged.
        cheapest: how it would run there.
    """

    device: DeviceFacts
    budget: MemoryBudget
    wish: Candidate
    best: Candidate | None
    alternatives: tuple[Estimated, ...]
    estimates: tuple[Estimated, ...]
    failed: tuple[tuple[Candidate, str], ...] = ()
    nearest_miss: Estimated | None = None
    frontier: tuple[FrontierPoint, ...] = ()
    cheapest_card: str | None = None
    cheapest: Estimated | None = None

    def of(self, candidate: Candidate) -> Estimated | None:
        """The estimate of a candidate; None where it was not estimated."""
        return next((e for e in self.estimates if e.candidate == candidate), None)

    @property
    def fitting(self) -> tuple[Estimated, ...]:
        """The best and its alternatives, best first."""
        best = None if self.best is None else self.of(self.best)
        return () if best is None else (best, *self.alternatives)

    def shortlist(self, count: int) -> list[Estimated]:
        """The best, then the next that is slower but needs less, and so on: nothing that another one beats in both."""
        chosen: list[Estimated] = []
        for estimated in self.fitting:
            if not chosen or estimated.needed_bytes < chosen[-1].needed_bytes:
                chosen.append(estimated)
        return chosen[:count]

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types: what `autofit plan --json` prints."""
        miss = self.nearest_miss
        return {
            "device": self.device.to_json(),
            "budget": {**asdict(self.budget), "usable_bytes": self.budget.usable_bytes},
            "wish": self.wish.to_json(),
            "best": self.fitting[0].to_json() if self.best is not None else None,
            "given_up": [] if self.best is None else [g.knob for g in lossy_given_up(self.wish, self.best, "")],
            "alternatives": [e.to_json() for e in self.alternatives],
            "nearest_miss": None if miss is None else miss.to_json(),
            "frontier": [asdict(point) for point in self.frontier],
            "cheapest_card": self.cheapest_card,
            "cheapest": None if self.cheapest is None else self.cheapest.to_json(),
            "estimated": len(self.estimates),
            "failed": [{"candidate": c.to_json(), "error": reason} for c, reason in self.failed],
        }


def make_plan(wish: Candidate, budget: MemoryBudget, device: DeviceFacts, answer: dict[str, Any]) -> Plan:
    """The plan that follows from the answer of `memory.planning.run_plan`."""
    estimates = tuple(Estimated.from_json(e) for e in answer["estimates"])
    fitting = rank_fitting(estimates, wish, budget.usable_bytes)
    cheapest = answer["cheapest"]
    return Plan(
        device=device,
        budget=budget,
        wish=wish,
        best=fitting[0].candidate if fitting else None,
        alternatives=tuple(fitting[1:]),
        estimates=estimates,
        failed=tuple((Candidate.from_json(f["candidate"]), f["error"]) for f in answer["failed"]),
        nearest_miss=None if fitting else min(estimates, key=lambda e: e.needed_bytes, default=None),
        frontier=_frontier([Estimated.from_json(e) for e in answer["frontier"]], budget.usable_bytes),
        cheapest_card=None if cheapest is None else cheapest["card"],
        cheapest=None if cheapest is None else Estimated.from_json(cheapest["estimate"]),
    )


def rank_fitting(estimates: Sequence[Estimated], wish: Candidate, usable_bytes: int) -> list[Estimated]:
    """Those of the first rung that has some that fit, fastest first; of equals, the one that gives up least.

    Args:
        estimates: rung by rung, as `space.plan_space.plan_rungs` has them.
        usable_bytes: of the budget.
    """
    fitting = [e for e in estimates if e.needed_bytes <= usable_bytes]
    if not fitting:
        return []
    first = _lossy(fitting[0].candidate)
    rung = [e for e in fitting if _lossy(e.candidate) == first]
    return sorted(rung, key=lambda e: (-(e.tokens_per_second or 0.0), *_cost(e.candidate, wish)))


def _lossy(candidate: Candidate) -> tuple[int, ...]:
    return tuple(getattr(candidate, knob) for knob in LOSSY)


def _cost(candidate: Candidate, wish: Candidate) -> tuple[int, ...]:
    """What costs most time first: offloading, recomputing, paging, then rows fewer than wished."""
    return (
        OFFLOADING.index(candidate.offload_activations),
        candidate.checkpointed_layers,
        int(candidate.optimizer != wish.optimizer),
        wish.micro_batch_size - candidate.micro_batch_size,
    )


def _frontier(estimates: Sequence[Estimated], usable_bytes: int) -> tuple[FrontierPoint, ...]:
    fitting: dict[tuple[int, int], list[int]] = {}
    for e in estimates:
        rows = fitting.setdefault((e.candidate.checkpointed_layers, e.candidate.max_seq_length), [])
        if e.needed_bytes <= usable_bytes:
            rows.append(e.candidate.micro_batch_size)
    return tuple(
        FrontierPoint(max_seq_length=length, checkpointed_layers=layers, rows=max(rows, default=None))
        for (layers, length), rows in sorted(fitting.items())
    )


def lossy_given_up(wish: Candidate, chosen: Candidate, sequence_cost: str) -> list[GivenUp]:
    """What of the wish the chosen candidate gives up that changes the result."""
    return [given for given in given_up(wish, chosen, sequence_cost) if given.lossy]


def why_nothing_fits(plan: Plan, space: SearchSpace) -> str:
    """One line: the nearest miss, what it would need, which knobs could be freed, and the cheapest card that would do.

    Args:
        plan: one without a `best`.
    """
    text = f"nothing fits {format_bytes(plan.budget.total_bytes)}"
    miss = plan.nearest_miss
    if miss is not None:
        c = miss.candidate
        text += (
            f"; the nearest miss (micro-batch {c.micro_batch_size}, length {c.max_seq_length}, "
            f"{c.checkpointed_layers} layers checkpointed, offloading {c.offload_activations}, "
            f"{c.quantization_bits} bits, rank {c.lora_rank}) would need {format_bytes(miss.needed_bytes)} "
            f"and {format_bytes(plan.budget.headroom_bytes)} headroom"
        )
    held = held_knobs(space)
    if miss is not None and miss.static_bytes > plan.budget.usable_bytes:
        held = [knob for knob in held if knob == "quantization_bits"]
    hints = [f"free {' or '.join(held)}"] if held else []
    if plan.cheapest_card is not None:
        hints.append(f"use {plan.cheapest_card}, the cheapest card that would run this as asked")
    return f"{text}; {', or '.join(hints)}" if hints else text
