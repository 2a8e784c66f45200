"""The job of a plan, in a child process: estimates rung after rung until one has something that fits."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

from autofit.errors import UsageError
from autofit.memory.calibration import Calibration
from autofit.memory.derive import estimate_many, side_by_side
from autofit.memory.estimate import Estimate, needed_bytes
from autofit.memory.forms import combined, forms_of
from autofit.memory.growth import LENGTH_UNIT
from autofit.memory.link import with_link
from autofit.memory.tracing import kernels_of
from autofit.space.budget import make_budget
from autofit.space.candidate import Candidate
from autofit.space.cards import CHEAPEST_FIRST, Card, card_of
from autofit.space.facts import DeviceFacts
from autofit.space.plan_request import PlanRequest
from autofit.space.plan_space import frontier_space, lean_ones, least_memory, plan_rungs
from autofit.space.target import facts_of
from autofit.step.policy import default_dtype

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
Forms = dict[Candidate, tuple[Candidate, ...]]


def run_plan(request: dict[str, Any], report: Callable[..., None]) -> dict[str, Any]:
    """Answers a `PlanRequest`.

    Returns JSON: `estimates` (a candidate and its figures each, rung by rung), `failed` (a candidate and the `error`),
    `frontier` (as `estimates`) and `cheapest` (`card`, `estimate`; None where no known card would do).

    Raises:
        UsageError: no candidate can be estimated; says why.
    """
    with side_by_side() as pool:
        job = _PlanJob(PlanRequest.from_json(request), pool)
        report("estimating")
        job.estimate_rungs()
        if not job.found:
            why = job.failed[0]["error"]
            raise UsageError(f"model {job.request.source.model}: no step of it can be estimated: {why}")
        outlook: dict[str, Any] = {"frontier": [], "cheapest": None}
        if job.request.longest is not None:
            report("outlook")
            outlook = {"frontier": [_figures(*f) for f in job.frontier()], "cheapest": job.cheapest()}
    return {"estimates": [_figures(*f) for f in job.found], "failed": job.failed, **outlook}


def _figures(candidate: Candidate, estimate: Estimate) -> dict[str, Any]:
    figures = estimate.to_json()
    return {"candidate": candidate.to_json(), **{name: figures[name] for name in _KEPT}}


def _static_bytes(estimate: Estimate) -> int:
    """What no batch, length, rank or checkpointing makes smaller."""
    return estimate.breakdown_bytes["weights"] + estimate.breakdown_bytes["context"]


@dataclass
class _PlanJob:
    request: PlanRequest
    pool: Executor | None

    def __post_init__(self) -> None:
        given = self.request.calibration
        self.calibration = None if given is None else Calibration(**given)
        self.rungs = plan_rungs(self.request.wish, self.request.limits, self.request.order)
        self.answers: dict[Candidate, Estimate | UsageError] = {}
        self.found: Found = []
        self.failed: list[dict[str, Any]] = []
        self.reached: Candidate | None = None
        self.elsewhere: dict[Hashable, list[tuple[Candidate, int]]] = {}

    def estimate_rungs(self) -> None:
        """Rung after rung; stops where one has something that fits.

        Of a rung the candidates that checkpoint most come first: where none of these fits, the others are left out.
        """
        too_heavy: set[int] = set()
        for number, rung in enumerate(self.rungs):
            bits = rung[0].quantization_bits
            if bits in too_heavy:
                continue
            found = self._ask(lean_ones(rung))
            if not self._fit(found):
                self.found += found
                statics = [_static_bytes(e) for _, e in found]
                if any(s > self.request.usable_bytes for s in statics) or not self._may_fit_below(number):
                    too_heavy.add(bits)
                continue
            self.reached = rung[0]
            self._ask([*rung, *self._frontier_space()])  # together: they share traces
            self.found += self._ask(rung)
            return

    def _fit(self, found: Found) -> bool:
        return any(needed_bytes(estimate) <= self.request.usable_bytes for _, estimate in found)

    def _may_fit_below(self, number: int) -> bool:
        """Whether a later rung with the same bits may fit: the shortest with the lowest rank says no for all.

        The leanest of the rungs that are only shorter are estimated on the way: they share their traces.
        """
        rung = self.rungs[number]
        bits, rank = rung[0].quantization_bits, rung[0].lora_rank
        later = [r for r in self.rungs[number + 1 :] if r[0].quantization_bits == bits]
        if not later:
            return False
        shorter = [c for r in later if r[0].lora_rank == rank for c in lean_ones(r) if c not in self.answers]
        if self._fit(self._ask([c for c in shorter if c.max_seq_length % LENGTH_UNIT == 0])):
            return True
        last = self._ask(lean_ones(later[-1]))
        self.found += [found for found in last if found not in self.found]
        return self._fit(last)

    def _ask(self, candidates: Iterable[Candidate]) -> Found:
        """The estimates of those that can be estimated; each is asked once."""
        forms = self._forms(candidates, self.request.device)
        new = [f for f in _all(forms) if f not in self.answers]
        answers = estimate_many(new, self.request.source, self.request.device, self.calibration, self.pool)
        self.answers.update(zip(new, answers, strict=True))
        for candidate, some in forms.items():
            why = [str(self.answers[f]) for f in some if isinstance(self.answers[f], UsageError)]
            failed = {"candidate": candidate.to_json(), "error": why[0]} if why else None
            if failed is not None and failed not in self.failed:
                self.failed.append(failed)
        return _together(forms, [(f, self.answers[f]) for f in _all(forms)], self.request.device)

    def _forms(self, candidates: Iterable[Candidate], device: DeviceFacts) -> Forms:
        layers, offloads = self.request.limits.checkpointable_layers, device.type == "cuda"
        return {candidate: forms_of(candidate, layers, offloads) for candidate in candidates}

    def frontier(self) -> Found:
        """Rows × length around the wish, with bits and rank of the first rung that fits (the last, where none does)."""
        return self._ask(self._frontier_space())

    def _frontier_space(self) -> list[Candidate]:
        asked, reached = self.request, self.reached or self.found[-1][0]
        if asked.longest is None:
            return []
        kept = asked.wish.replace(quantization_bits=reached.quantization_bits, lora_rank=reached.lora_rank)
        return frontier_space(kept, asked.limits, asked.order, asked.longest)

    def cheapest(self) -> dict[str, Any] | None:
        """The first card, from the cheapest, that runs the wish with nothing given up that changes the result."""
        weights = min((e.breakdown_bytes["weights"] for c, e in self.found if self._as_wished(c)), default=0)
        for card in CHEAPEST_FIRST:
            usable = make_budget(card.name, facts_of(card)).usable_bytes
            if weights > usable:
                continue
            for candidate, needed in self._on(card):
                if needed <= usable:
                    plain = candidate.replace(offload_activations="none")
                    found = dict(self._estimated(dict.fromkeys((plain, candidate)), facts_of(card)))
                    return {"card": card.name, "estimate": _figures(candidate, found[candidate])}
        return None

    def _as_wished(self, candidate: Candidate) -> bool:
        return candidate.quantization_bits == self.request.wish.quantization_bits

    def _on(self, card: Card) -> list[tuple[Candidate, int]]:
        """What needs least on a card and how many bytes; cards that run the same kernels are estimated once."""
        asked, device = self.request, facts_of(card)
        wish = asked.wish.replace(dtype=default_dtype(device)) if asked.own_dtype else asked.wish
        key = wish.dtype, kernels_of(device)
        if key not in self.elsewhere:
            space = least_memory(wish, replace(asked.limits, can_page=True), asked.order)
            here = self.calibration is None and kernels_of(asked.device) == kernels_of(device)
            answers = self.answers if here else {}
            known = {c: needed_bytes(e) for c, e in answers.items() if isinstance(e, Estimate)}
            found = self._estimated([c for c in space if c not in known], device)
            known.update((c, needed_bytes(e)) for c, e in found)
            self.elsewhere[key] = [(c, known[c]) for c in space if c in known]
        return self.elsewhere[key]

    def _estimated(self, candidates: Iterable[Candidate], device: DeviceFacts) -> Found:
        """Estimates for another device, as it comes."""
        forms = self._forms(candidates, device)
        asked = _all(forms)
        answers = estimate_many(asked, self.request.source, device, None, self.pool)
        return _together(forms, list(zip(asked, answers, strict=True)), device)


def _all(forms: Forms) -> list[Candidate]:
    return list(dict.fromkeys(form for some in forms.values() for form in some))


def _together(forms: Forms, answers: Sequence[tuple[Candidate, Estimate | UsageError]], device: DeviceFacts) -> Found:
    """The estimates of the candidates, from those of their forms; without those of which one cannot be estimated."""
    found = [(form, answer) for form, answer in answers if isinstance(answer, Estimate)]
    card = card_of(device.name, device.total_bytes) if device.type == "cuda" else None
    known = dict(found if card is None else with_link(found, card))
    return [(c, combined(some, known)) for c, some in forms.items() if all(form in known for form in some)]
