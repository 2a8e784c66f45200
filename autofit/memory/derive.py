"""Few traces, many answers: candidates that differ in nothing but their micro-batch's rows and length share a trace."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autofit.errors import UsageError
from autofit.memory.allocator import UNIT_BYTES
from autofit.memory.calibration import ON_CPU, UNCALIBRATED, Calibration
from autofit.memory.estimate import Estimate, estimate, replay, spliced, traced_as
from autofit.memory.families import cost, families, kin, shape_of
from autofit.memory.growth import (
    Template,
    basis,
    constant,
    template_for_length,
    template_for_lengths,
    template_for_packed,
)
from autofit.memory.roofline import Growing
from autofit.memory.splice import Unspliceable
from autofit.memory.trace import FREED, STATIC, Trace
from autofit.memory.tracing import Traced
from autofit.space.candidate import Candidate
from autofit.space.cards import card_of
from autofit.space.facts import DeviceFacts
from autofit.space.source import ModelSource
from autofit.step.configs import load_config

# Rows × length of the micro-batch whose replay tells how much the allocator takes beyond tensors.
_MIDDLING_TOKENS = 8192
# Blocks of a packed row from which on hardly a tensor is too small to be offloaded.
_SOME_BLOCKS = 16

_Answers = list[Estimate | UsageError]
_Question = tuple[list[list[Candidate]], ModelSource, DeviceFacts, Calibration | None]


@contextlib.contextmanager
def side_by_side() -> Iterator[Executor | None]:
    """Processes that trace side by side, for `estimate_many`: one for each core; None where there is only one.

    They are forked from this one, which must not run a backward pass itself: autograd does not survive a fork.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if cores == 1:
        yield None
        return
    pool = ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("fork"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def estimate_many(
    candidates: Sequence[Candidate],
    source: ModelSource,
    device: DeviceFacts,
    calibration: Calibration | None = None,
    pool: Executor | None = None,
) -> list[Estimate | UsageError]:
    """The estimate of each candidate, in order; what rules a candidate out stands in its place.

    Derived estimates have the traced ones' allocated bytes; their reserved bytes follow from one replay for all that
    share a trace, and they come without a breakdown's details. `pool` is that of `side_by_side`; without one they are
    made in this process.
    """
    related = sorted(kin(candidates, families(candidates, source), source), key=lambda k: -cost(candidates, k))
    questions = [
        ([[candidates[i] for i in indices] for indices in group], source, device, calibration) for group in related
    ]
    found: dict[int, Estimate | UsageError] = {}
    for group, answers in zip(related, (pool.map if pool else map)(_answer, questions), strict=True):
        for indices, some in zip(group, answers, strict=True):
            found.update(zip(indices, some, strict=True))
    return [found[i] for i in range(len(candidates))]


def _answer(question: _Question) -> list[_Answers]:
    """The estimates of each of the families, which may share a trace."""
    related, source, device, calibration = question
    counts = tuple(members[0].checkpointed_layers for members in related)
    return [_of_family(members, counts, source, device, calibration) for members in related]


def _of_family(
    members: list[Candidate],
    counts: tuple[int, ...],
    source: ModelSource,
    device: DeviceFacts,
    calibration: Calibration | None,
) -> _Answers:
    """One family's estimates: from one trace where that does, else one by one."""
    derived = _derive(members, counts, source, device, calibration) if len(members) > 1 else None
    return derived or [_one(member, source, device, calibration) for member in members]


def _one(
    candidate: Candidate, source: ModelSource, device: DeviceFacts, calibration: Calibration | None
) -> Estimate | UsageError:
    try:
        return estimate(candidate, source, device, calibration)
    except UsageError as error:
        return error


def _derive(
    members: list[Candidate],
    counts: tuple[int, ...],
    source: ModelSource,
    device: DeviceFacts,
    calibration: Calibration | None,
) -> _Answers | None:
    """Estimates from one trace of a prime number of rows; None where that does not do for these candidates."""
    packed = members[0].layout == "packed"
    if not packed and any(m.token_budget != m.micro_batch_size * m.max_seq_length for m in members):
        return None
    lengths = sorted({shape_of(member)[1] for member in members})
    config = load_config(source).to_dict()
    # What offloading all leaves where it is depends on its size.
    any_length = None if members[0].offload_activations == "all" else template_for_lengths(config, lengths)
    templates = (any_length, template_for_length(config, lengths))
    if packed:
        templates = (template_for_packed(config, max(m.max_seq_length for m in members)), None)
    for template in filter(None, templates):
        try:
            family = _Family.of(members[0], counts, template, lengths, source, device, calibration)
        except UsageError:
            return None  # one by one they say why, and what cannot be traced with many rows may be with few
        if family is not None:
            return [family.estimate(m) or _one(m, source, device, calibration) for m in members]
    if len(lengths) == 1:
        return None
    found: dict[Candidate, Estimate | UsageError] = {}
    for length in lengths:
        some = [m for m in members if m.max_seq_length == length]
        found.update(zip(some, _of_family(some, counts, source, device, calibration), strict=True))
    return [found[m] for m in members]


def _traced(
    member: Candidate, counts: tuple[int, ...], template: Template, source: ModelSource, device: DeviceFacts
) -> Traced:
    """The trace of a candidate: that of all these numbers of checkpointed layers where it serves this one."""
    plain = member.replace(tokens_per_micro_batch=None, checkpointed_layers=counts[0]).replace(micro_batch_size=1)
    if member.layout == "padded":
        plain = plain.replace(max_seq_length=1)  # the template's will be taken
    shared = _shared_trace(plain, counts[1:], template, source, device)
    if member.checkpointed_layers in shared.layers:
        return shared
    return traced_as(member, template, source, device)


@functools.lru_cache(maxsize=4)
def _shared_trace(
    candidate: Candidate, others: tuple[int, ...], template: Template, source: ModelSource, device: DeviceFacts
) -> Traced:
    return traced_as(candidate, template, source, device, others)


# By what was asked: the fewest rows from which on derived events are the traced ones; None: they never are.
_checked: dict[Any, int | None] = {}


def _least_rows(
    trace: Trace,
    template: Template,
    length: int,
    member: Candidate,
    counts: tuple[int, ...],
    source: ModelSource,
    device: DeviceFacts,
) -> int | None:
    """From how many rows on the template's trace tells what another micro-batch takes; None where it does not.

    Some layers loop over parts of a sequence, and a single row may be spared a copy: so one or two rows of the shortest
    length are traced as they are, once in this process for candidates that differ in what changes neither.
    """
    key = _kind(template, length, member, source, device)
    if key not in _checked:
        growth = _growth_of_events(trace)
        _checked[key] = None
        for rows in (2, _SOME_BLOCKS) if member.layout == "packed" else (1, 2):
            real = _traced(member, counts, Template(rows, length, None), source, device).trace
            if real.keys == trace.keys and _sizes(growth, trace, rows, length) == real.sizes:
                _checked[key] = rows
                break
    return _checked[key]


def _kind(template: Template, length: int, member: Candidate, source: ModelSource, device: DeviceFacts) -> Any:
    plain = member.replace(tokens_per_micro_batch=None)
    plain = plain.replace(micro_batch_size=1, max_seq_length=length, checkpointed_layers=0, optimizer="adamw_torch")
    return template, length, plain, source, device


def _sizes(growth: np.ndarray, trace: Trace, rows: int, length: int) -> list[int]:
    """The trace's sizes with so many rows of so many tokens."""
    grown = np.rint(growth @ basis(rows, length)).astype(np.int64).tolist()
    return [FREED if traced == FREED else size for traced, size in zip(trace.sizes, grown, strict=True)]


@dataclass
class _Family:
    """Candidates that differ in rows and length only.

    Attributes:
        candidate: one of them.
        growth: of each event, see `growth.basis`: of a release, what it releases, negative.
        begin: the first event of the first step.
        work: what a step computes and moves; None where the card is not known.
        least_rows: with fewer, a micro-batch is no member.
        slack: reserved bytes as a share of allocated ones.
    """

    candidate: Candidate
    trace: Trace
    device: DeviceFacts
    calibration: Calibration
    growth: np.ndarray
    begin: int
    paged_bytes: int
    work: Growing | None
    least_rows: int
    slack: float = 1.0

    @classmethod
    def of(
        cls,
        member: Candidate,
        counts: tuple[int, ...],
        template: Template,
        lengths: Sequence[int],
        source: ModelSource,
        device: DeviceFacts,
        calibration: Calibration | None,
    ) -> _Family | None:
        """The family of a candidate.

        None where values decide how much it needs, a trace cannot be spliced, or the template's tells nothing of these
        lengths.
        """
        if _checked.get(_kind(template, lengths[0], member, source, device), 1) is None:
            return None
        with contextlib.suppress(Unspliceable):
            traced = _traced(member, counts, template, source, device)
            if traced.trace.guesses or traced.undecided or _misleads(template, traced.trace):
                return None
            least_rows = _least_rows(traced.trace, template, lengths[0], member, counts, source, device)
            if least_rows is None:
                return None
            try:
                trace = spliced(traced, member.checkpointed_layers)
            except Unspliceable:
                if len(counts) == 1:
                    raise
                return cls.of(member, (member.checkpointed_layers,), template, lengths, source, device, calibration)
            card = card_of(device.name, device.total_bytes) if device.type == "cuda" else None
            family = cls(
                candidate=member,
                trace=trace,
                device=device,
                calibration=ON_CPU if device.type == "cpu" else calibration or UNCALIBRATED,
                growth=_growth_of_events(trace),
                begin=next(event for event, _, section in trace.sections if section.step),
                paged_bytes=traced.paged_bytes,
                least_rows=least_rows,
                work=None if card is None else Growing.of(trace, template, card),
            )
            family.slack = family.replayed_slack(lengths[len(lengths) // 2])
            return family
        return None

    def peak(self, rows: int, length: int) -> tuple[int, int]:
        """(allocated bytes at the peak, index of the event)."""
        sizes = np.rint(self.growth @ basis(rows, length))
        if self.device.type == "cuda":
            sizes = np.sign(sizes) * (np.ceil(np.abs(sizes) / UNIT_BYTES) * UNIT_BYTES)
        live = np.cumsum(sizes)
        at = self.begin + int(np.argmax(live[self.begin :]))
        return int(live[at]), at

    def replayed_slack(self, length: int) -> float:
        """Reserved by allocated bytes, for a middling micro-batch of this length."""
        if self.device.type == "cpu":
            return 1.0
        rows = max(1, _MIDDLING_TOKENS // length)
        trace = replace(self.trace, sizes=_sizes(self.growth, self.trace, rows, length))
        allocated, reserved = replay(trace, expandable_segments=self.candidate.step == "autofit")
        return reserved / allocated

    def estimate(self, member: Candidate) -> Estimate | None:
        """A member's estimate; None where it is none."""
        rows, length = shape_of(member)
        if rows < self.least_rows:
            return None
        peak, at = self.peak(rows, length)
        allocated = peak + self.calibration.allocated_bytes
        reserved = round(peak * self.slack) + self.calibration.allocated_bytes
        section = max((s for s in self.trace.sections if s[0] <= at), key=lambda s: s[0])[2]
        return Estimate(
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=reserved,
            device_bytes=reserved + self.calibration.context_bytes,
            tokens_per_second=self._speed(rows, length),
            breakdown_bytes=self._breakdown(reserved),
            peak_phase=str(section),
            paged_bytes=self.paged_bytes,
        )

    def _breakdown(self, reserved: int) -> dict[str, int]:
        """Weights and context as they are; all else is one sum."""
        labels = self.trace.labels
        pairs = zip(self.trace.keys[: self.begin], self.trace.sizes[: self.begin], strict=True)
        weights = sum(size for key, size in pairs if size != FREED and labels.get(key) == "weights")
        context = self.calibration.context_bytes
        return {"weights": weights, "everything else": reserved - weights, "context": context}

    def _speed(self, rows: int, length: int) -> float | None:
        if self.work is None:
            return None
        tokens = (2 if self.candidate.accumulates else 1) * rows * length
        return tokens / self.work.step_seconds(rows, length) * self.calibration.speed


def _misleads(template: Template, trace: Trace) -> bool:
    """Whether one of the template's primes divides what is as large whatever the micro-batch is."""
    primes = [template.rows] if template.prime is None else [template.rows, template.prime]
    static = {size for key, size in zip(trace.keys, trace.sizes, strict=True) if trace.labels.get(key) in STATIC}
    return any(size > 0 and size % prime == 0 for size in static for prime in primes)


def _growth_of_events(trace: Trace) -> np.ndarray:
    """[events, columns of growth]."""
    rows = [trace.growth.get(key) or constant(size) for key, size in zip(trace.keys, trace.sizes, strict=True)]
    events = np.array(rows)
    events[np.array(trace.sizes) == FREED] *= -1
    return events
