"""The job of a plan, in a child process: estimates rung after rung until one has something that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autofit.errors import UsageError
from autofit.memory.calibration import Calibration
from autofit.memory.derive import estimate_many
from autofit.memory.estimate import Estimate
from autofit.memory.link import with_link
from autofit.space.budget import make_budget
from autofit.space.candidate import Candidate
from autofit.space.cards import CHEAPEST_FIRST, Card, card_of
from autofit.space.facts import DeviceFacts
from autofit.space.plan_request import PlanRequest
from autofit.space.plan_space import frontier_space, least_memory, plan_rungs
from autofit.space.target import facts_of
from autofit.step.policy import default_dtype

# A rung is the last one where this share of the budget is enough for one of its candidates: what is measured then may
# be some more than estimated without the search having to leave the plan.
_EASY = 0.95
_KEPT = (
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "device_bytes",
    "tokens_per_second",
    "breakdown_bytes",
    "peak_phase",
    "paged_bytes",
    "bracket",
)

Found = list[tuple[Candidate, Estimate]]


def run_plan(request: dict[str, Any], report: Callable[..., None]) -> dict[str, Any]:
    """Answers a `PlanRequest`.

    Returns JSON: `estimates` (a candidate and its figures each, rung by rung), `failed` (a candidate and the `error`),
    `frontier` (as `estimates`) and `cheapest` (`card`, `estimate`; None where no known card would do).

    Raises:
        UsageError: no candidate can be estimated; says why.
    """
    job = _PlanJob(PlanRequest.from_json(request))
    report("estimating")
    job.estimate_rungs()
    if not job.found:
        raise UsageError(f"model {job.request.source.model}: no step of it can be estimated: {job.failed[0]['error']}")
    outlook: dict[str, Any] = {"frontier": [], "cheapest": None}
    if job.request.longest is not None:
        report("outlook")
        outlook = {"frontier": [_figures(*f) for f in job.frontier()], "cheapest": job.cheapest()}
    return {"estimates": [_figures(*f) for f in job.found], "failed": job.failed, **outlook}


def _figures(candidate: Candidate, estimate: Estimate) -> dict[str, Any]:
    figures = estimate.to_json()
    return {"candidate": candidate.to_json(), **{name: figures[name] for name in _KEPT}}


def needed_bytes(estimate: Estimate) -> int:
    """What the driver will show at most: where values decide that nobody has, the higher end."""
    above = estimate.bracket[1] - estimate.peak_allocated_bytes if estimate.bracket else 0
    return estimate.device_bytes + max(0, above)


def _static_bytes(estimate: Estimate) -> int:
    """What no batch, length, rank or checkpointing makes smaller."""
    return estimate.breakdown_bytes["weights"] + estimate.breakdown_bytes["context"]


@dataclass
class _PlanJob:
    request: PlanRequest

    def __post_init__(self) -> None:
        given = self.request.calibration
        self.calibration = None if given is None else Calibration(**given)
        self.found: Found = []
        self.failed: list[dict[str, Any]] = []
        self.reached: Candidate | None = None

    def estimate_rungs(self) -> None:
        """Rung after rung; stops where one has something that fits easily."""
        asked = self.request
        too_heavy: set[int] = set()
        for rung in plan_rungs(asked.wish, asked.limits, asked.order):
            bits = rung[0].quantization_bits
            if bits in too_heavy:
                continue
            found = self._estimated(rung, asked.device, self.calibration)
            self.found += found
            if any(_static_bytes(e) > asked.usable_bytes for _, e in found):
                too_heavy.add(bits)
            if self.reached is None and any(needed_bytes(e) <= asked.usable_bytes for _, e in found):
                self.reached = rung[0]
            if any(needed_bytes(e) <= _EASY * asked.usable_bytes for _, e in found):
                return

    def frontier(self) -> Found:
        """Rows × length around the wish, with bits and rank of the first rung that fits (the last, where none does)."""
        asked, reached = self.request, self.reached or self.found[-1][0]
        kept = asked.wish.replace(quantization_bits=reached.quantization_bits, lora_rank=reached.lora_rank)
        space = frontier_space(kept, asked.limits, asked.order, asked.longest or asked.wish.max_seq_length)
        return self._estimated(space, asked.device, self.calibration)

    def cheapest(self) -> dict[str, Any] | None:
        """The first card, from the cheapest, that runs the wish with nothing given up that changes the result.

        Cards of one compute capability differ in memory and speed alone: the bytes are estimated once for each.
        """
        needed: dict[tuple[int, int], int | None] = {}
        for card in CHEAPEST_FIRST:
            kind, usable = card.compute_capability, make_budget(card.name, facts_of(card)).usable_bytes
            if kind not in needed:
                needed[kind] = min((needed_bytes(e) for _, e in self._on(card)), default=None)
            least = needed[kind]
            if least is not None and least <= usable:
                fitting = [found for found in self._on(card) if needed_bytes(found[1]) <= usable]
                best = max(fitting, key=lambda found: found[1].tokens_per_second or 0.0)
                return {"card": card.name, "estimate": _figures(*best)}
        return None

    def _on(self, card: Card) -> Found:
        asked, device = self.request, facts_of(card)
        wish = asked.wish.replace(dtype=default_dtype(device)) if asked.own_dtype else asked.wish
        space = least_memory(wish, replace(asked.limits, can_page=True), asked.order)
        return self._estimated(space, device, None)

    def _estimated(
        self, candidates: Sequence[Candidate], device: DeviceFacts, calibration: Calibration | None
    ) -> Found:
        answers = estimate_many(candidates, self.request.source, device, calibration)
        found: Found = []
        for candidate, answer in zip(candidates, answers, strict=True):
            if isinstance(answer, UsageError):
                self.failed.append({"candidate": candidate.to_json(), "error": str(answer)})
            else:
                found.append((candidate, answer))
        card = card_of(device.name, device.total_bytes) if device.type == "cuda" else None
        return found if card is None else with_link(found, card)
