"""Few traces, many answers: candidates that differ in nothing but their rows share one trace.

At a fixed length every allocation of a step grows linearly with the rows of the micro-batch, or not at all. So one
trace with a prime number of rows tells the two apart: what is a multiple of the prime grows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autofit.errors import UsageError
from autofit.memory.allocator import UNIT_BYTES
from autofit.memory.calibration import ON_CPU, UNCALIBRATED, Calibration
from autofit.memory.estimate import Estimate, estimate, replay, spliced, traced_rows
from autofit.memory.roofline import device_seconds, host_seconds, last_step
from autofit.memory.splice import Unspliceable
from autofit.memory.trace import FREED, TILE, Trace
from autofit.space.candidate import Candidate
from autofit.space.cards import Card, card_of
from autofit.space.facts import DeviceFacts
from autofit.space.source import ModelSource
from autofit.step.configs import load_config

_PRIMES = (23, 29, 31, 37, 41, 43)
# TRL's tiles of logits have at most so many rows of tokens.
_TILE_TOKENS = 4096


def estimate_many(
    candidates: Sequence[Candidate],
    source: ModelSource,
    device: DeviceFacts,
    calibration: Calibration | None = None,
) -> list[Estimate | UsageError]:
    """The estimate of each candidate, in order; what rules a candidate out stands in its place.

    Derived estimates have the traced ones' allocated bytes; their reserved bytes follow from one replay for all that
    share a trace, and they come without a breakdown's details.
    """
    groups: dict[Candidate, list[int]] = {}
    for i, candidate in enumerate(candidates):
        alike = candidate.replace(tokens_per_micro_batch=None).replace(micro_batch_size=1)
        groups.setdefault(alike, []).append(i)
    found: dict[int, Estimate | UsageError] = {}
    for indices in groups.values():
        members = [candidates[i] for i in indices]
        derived = _derive(members, source, device, calibration) if len(members) > 1 else None
        answers = derived or [_one(member, source, device, calibration) for member in members]
        found.update(zip(indices, answers, strict=True))
    return [found[i] for i in range(len(candidates))]


def _one(
    candidate: Candidate, source: ModelSource, device: DeviceFacts, calibration: Calibration | None
) -> Estimate | UsageError:
    try:
        return estimate(candidate, source, device, calibration)
    except UsageError as error:
        return error


def _derive(
    members: list[Candidate], source: ModelSource, device: DeviceFacts, calibration: Calibration | None
) -> list[Estimate | UsageError] | None:
    """Estimates from one trace of a prime number of rows; None where that does not do for these candidates."""
    rows = _prime_for(source)
    if rows is None or any(m.token_budget != m.micro_batch_size * m.max_seq_length for m in members):
        return None
    try:
        family = _Family.of(members[0].replace(micro_batch_size=rows), source, device, calibration)
    except UsageError:
        return None  # one by one they say why, and what cannot be traced with many rows may be with few
    return None if family is None else [family.estimate(member.micro_batch_size) for member in members]


def _prime_for(source: ModelSource) -> int | None:
    """A prime that divides no size of the model."""
    sizes = _integers(load_config(source).to_dict())
    return next((p for p in _PRIMES if all(size % p for size in sizes if size)), None)


def _integers(tree: Any) -> list[int]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        return [number for item in tree for number in _integers(item)]
    return [tree] if type(tree) is int and tree > 1 else []


@dataclass
class _Family:
    """Candidates that differ in their rows only.

    Attributes:
        template: the traced candidate: `micro_batch_size` is the prime.
        fixed, per_row: bytes of each allocation event; of a release, of what it releases, negative.
        tiles: which events are TRL's tile of logits: bytes for a token, up to `_TILE_TOKENS` tokens.
        seconds: see `_seconds`; None where the card is not known.
        slack: reserved bytes as a share of allocated ones.
    """

    template: Candidate
    trace: Trace
    device: DeviceFacts
    calibration: Calibration
    fixed: np.ndarray
    per_row: np.ndarray
    tiles: np.ndarray
    begin: int
    paged_bytes: int
    seconds: tuple[float, float, float] | None
    slack: float = 1.0

    @classmethod
    def of(
        cls, template: Candidate, source: ModelSource, device: DeviceFacts, calibration: Calibration | None
    ) -> _Family | None:
        """The family of a template; None where values decide how much it needs, or a trace cannot be spliced."""
        with contextlib.suppress(Unspliceable):
            traced = traced_rows(template, source, device)
            trace = spliced(traced)
            if trace.guesses or traced.undecided:
                return None
            fixed, per_row, tiles = _linear(trace, template)
            card = card_of(device.name, device.total_bytes) if device.type == "cuda" else None
            family = cls(
                template=template,
                trace=trace,
                device=device,
                calibration=ON_CPU if device.type == "cpu" else calibration or UNCALIBRATED,
                fixed=fixed,
                per_row=per_row,
                tiles=tiles,
                begin=next(event for event, _, section in trace.sections if section.step),
                paged_bytes=traced.paged_bytes,
                seconds=_seconds(trace, template, card),
            )
            family.slack = family.replayed_slack()
            return family
        return None

    def sizes(self, rows: int) -> np.ndarray:
        """Bytes of every event for so many rows; negative where they are released."""
        sizes = self.fixed + self.per_row * rows
        tokens = min(rows * self.template.max_seq_length, _TILE_TOKENS)
        return np.where(self.tiles != 0, self.tiles * tokens, sizes)

    def peak(self, rows: int) -> tuple[int, int]:
        """(allocated bytes at the peak, index of the event)."""
        sizes = self.sizes(rows)
        if self.device.type == "cuda":
            sizes = np.sign(sizes) * (np.ceil(np.abs(sizes) / UNIT_BYTES) * UNIT_BYTES)
        live = np.cumsum(sizes)
        at = self.begin + int(np.argmax(live[self.begin :]))
        return int(live[at]), at

    def replayed_slack(self) -> float:
        """Reserved by allocated bytes, for a middling number of rows."""
        if self.device.type == "cpu":
            return 1.0
        rows = max(1, 8192 // self.template.max_seq_length)
        pairs = zip(self.trace.sizes, self.sizes(rows).tolist(), strict=True)
        sizes = [FREED if traced == FREED else round(size) for traced, size in pairs]
        trace = replace(self.trace, sizes=sizes)
        allocated, reserved = replay(trace, expandable_segments=self.template.step == "autofit")
        return reserved / allocated

    def estimate(self, rows: int) -> Estimate:
        """The estimate for so many rows."""
        peak, at = self.peak(rows)
        allocated = peak + self.calibration.allocated_bytes
        reserved = round(peak * self.slack) + self.calibration.allocated_bytes
        section = max((s for s in self.trace.sections if s[0] <= at), key=lambda s: s[0])[2]
        return Estimate(
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=reserved,
            device_bytes=reserved + self.calibration.context_bytes,
            tokens_per_second=self._speed(rows),
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

    def _speed(self, rows: int) -> float | None:
        if self.seconds is None:
            return None
        constant, per_row, host = self.seconds
        tokens = (2 if self.template.accumulates else 1) * rows * self.template.max_seq_length
        return tokens / max(constant + per_row * rows, host) * self.calibration.speed


def _seconds(trace: Trace, template: Candidate, card: Card | None) -> tuple[float, float, float] | None:
    """(seconds whatever the rows are: dequantizing; seconds for each row; seconds of the host) of a step."""
    if card is None:
        return None
    operations = last_step(trace)
    per_row = device_seconds(operations.that_grow(True), card) / template.micro_batch_size
    return device_seconds(operations.that_grow(False), card), per_row, host_seconds(operations)


def _linear(trace: Trace, template: Candidate) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bytes whatever the rows are, bytes for each row, bytes of a tile for each of its tokens), event by event."""
    prime = template.micro_batch_size
    parts: dict[int, tuple[float, float, float]] = {}
    events = np.zeros((len(trace.keys), 3))
    for event, (key, size) in enumerate(zip(trace.keys, trace.sizes, strict=True)):
        if size == FREED:
            events[event] = -np.asarray(parts.pop(key))
            continue
        if trace.labels.get(key) == TILE:
            part = (0.0, 0.0, size / (prime * template.max_seq_length))
        elif key in trace.per_row:
            fixed, per_row = trace.per_row[key]
            part = (fixed, per_row, 0.0)
        elif size % prime == 0:
            part = (0.0, size / prime, 0.0)
        else:
            part = (float(size), 0.0, 0.0)
        parts[key] = part
        events[event] = part
    return events[:, 0], events[:, 1], events[:, 2]
