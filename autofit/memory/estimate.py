"""What a candidate's step will take, known before it runs: traced on meta tensors, no device and no weights needed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from autofit.errors import UsageError
from autofit.memory.allocator import CachingAllocator
from autofit.memory.breakdown import PARTS, find_peak
from autofit.memory.calibration import ON_CPU, UNCALIBRATED, Calibration
from autofit.memory.growth import Template
from autofit.memory.repeat import repeat_step
from autofit.memory.roofline import step_seconds
from autofit.memory.splice import Unspliceable, splice
from autofit.memory.trace import Trace
from autofit.memory.tracing import Traced, trace_candidate
from autofit.space.candidate import Candidate
from autofit.space.cards import Card, card_of
from autofit.space.facts import DeviceFacts
from autofit.space.source import ModelSource


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An estimate of a candidate on a device. Sizes in bytes; the peaks are the training steps'.

    Attributes:
        peak_allocated_bytes, peak_reserved_bytes: tensors; the caching allocator.
        device_bytes: what the driver will show: reserved, and the CUDA context.
        tokens_per_second: padded tokens of a warm micro-batch; None on a CPU or for a card that is not known.
        breakdown_bytes: at the moment of the peak; adds up to `device_bytes`.
        peak_phase: where in the step the peak is.
        paged_bytes: optimizer states in managed memory; the driver moves them to the host where room is short.
        bracket: lowest and highest `peak_allocated_bytes`, only where values decide that nobody has.
        guesses: what was made up for values that nobody has, and how often.
        seconds: what the estimate took.
    """

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    device_bytes: int
    tokens_per_second: float | None
    breakdown_bytes: dict[str, int]
    peak_phase: str
    paged_bytes: int = 0
    bracket: tuple[int, int] | None = None
    guesses: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        return asdict(self)


def needed_bytes(estimate: Estimate) -> int:
    """What the driver will show at most: where values decide that nobody has, the higher end."""
    above = estimate.bracket[1] - estimate.peak_allocated_bytes if estimate.bracket else 0
    return estimate.device_bytes + max(0, above)


def estimate(
    candidate: Candidate, source: ModelSource, device: DeviceFacts, calibration: Calibration | None = None
) -> Estimate:
    """What the candidate's steps take on the device, which need not be there.

    Of one that `has_long_rows`, estimate `usual()` and `alone()`.

    Raises:
        UsageError: no such model, a candidate that it cannot be built for, or a step that cannot be run without values;
            says which and why.
    """
    if candidate.has_long_rows:
        raise UsageError(
            f"tokens_per_micro_batch {candidate.token_budget}: a longer sequence runs otherwise than the rest"
        )
    with _named(source):
        return _estimate(candidate, source, device, calibration)


def traced_as(
    candidate: Candidate, template: Template, source: ModelSource, device: DeviceFacts, counts: Sequence[int] = ()
) -> Traced:
    """The trace of a candidate with the template's micro-batch, which stands for any other. For `counts` see there.

    Raises:
        UsageError: as `estimate` does.
    """
    tokens = template.rows * template.length
    grown = candidate.replace(tokens_per_micro_batch=None)
    if candidate.layout == "packed":
        longest = min(candidate.max_seq_length, tokens)
        grown = grown.replace(micro_batch_size=-(-tokens // longest), max_seq_length=longest)
        grown = grown.replace(tokens_per_micro_batch=tokens)
    else:
        grown = grown.replace(micro_batch_size=template.rows, max_seq_length=template.length)
    with _named(source):
        return trace_candidate(grown, source, device, template=template, counts=counts)


@contextlib.contextmanager
def _named(source: ModelSource) -> Iterator[None]:
    """What a model raises where its values are missing becomes one line that names it."""
    try:
        yield
    except (UsageError, Unspliceable):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UsageError(f"model {source.model}: its step cannot be traced: {why[:300]}") from error


def _estimate(
    candidate: Candidate, source: ModelSource, device: DeviceFacts, calibration: Calibration | None
) -> Estimate:
    start = time.perf_counter()
    traced, trace = whole_trace(candidate, source, device)
    if device.type == "cpu":
        calibration = ON_CPU
    measured = _measure(trace, candidate, device, calibration or UNCALIBRATED)
    peak = measured["peak_allocated_bytes"]
    bracket = None
    if trace.guesses or traced.undecided:
        _, contrary = whole_trace(candidate, source, device, fill=True)
        other = _measure(contrary, candidate, device, calibration or UNCALIBRATED)["peak_allocated_bytes"]
        bracket = None if other == peak else (min(peak, other), max(peak, other))
    card = card_of(device.name, device.total_bytes) if device.type == "cuda" else None
    return Estimate(
        **measured,
        tokens_per_second=_speed(traced, trace, candidate, card, calibration or UNCALIBRATED),
        paged_bytes=traced.paged_bytes,
        bracket=bracket,
        guesses=trace.guesses,
        seconds=time.perf_counter() - start,
    )


def whole_trace(
    candidate: Candidate, source: ModelSource, device: DeviceFacts, *, fill: bool = False
) -> tuple[Traced, Trace]:
    """The trace of all layers: put together from a few where that is possible, else of every one.

    `fill` is what unknown masks are taken for, see `guesses`.
    """
    with contextlib.suppress(Unspliceable):
        traced = trace_candidate(candidate, source, device, fill=fill)
        return traced, spliced(traced, candidate.checkpointed_layers)
    traced = trace_candidate(candidate, source, device, whole=True, fill=fill)
    return traced, traced.trace


def spliced(traced: Traced, checkpointed_layers: int) -> Trace:
    """The trace of all layers, so many of them checkpointed, and of both optimizer steps.

    Raises:
        Unspliceable: a layer reaches too far.
    """
    trace = splice(traced.trace, traced.layers[checkpointed_layers], traced.reach)
    return repeat_step(trace) if traced.once else trace


def _measure(trace: Trace, candidate: Candidate, device: DeviceFacts, calibration: Calibration) -> dict[str, Any]:
    peak = find_peak(trace)
    allocated = reserved = peak.live_bytes
    if device.type == "cuda":
        allocated, reserved = replay(trace, expandable_segments=candidate.step == "autofit")
    allocated += calibration.allocated_bytes
    reserved += calibration.allocated_bytes
    parts = {**peak.parts, PARTS[-2]: reserved - peak.live_bytes, PARTS[-1]: calibration.context_bytes}
    return {
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": reserved,
        "device_bytes": reserved + calibration.context_bytes,
        "breakdown_bytes": parts,
        "peak_phase": str(peak.section),
    }


def replay(trace: Trace, *, expandable_segments: bool) -> tuple[int, int]:
    """(peak allocated, peak reserved) bytes of the caching allocator, once the model stands, its cache emptied."""
    allocator = CachingAllocator(expandable_segments=expandable_segments)
    begin = next(event for event, _, section in trace.sections if section.step)
    allocator.replay(trace.keys[:begin], trace.sizes[:begin])
    allocator.empty_cache()
    allocator.reset_peak()
    allocator.replay(trace.keys[begin:], trace.sizes[begin:])
    return allocator.peak_allocated_bytes, allocator.peak_reserved_bytes


def _speed(
    traced: Traced, trace: Trace, candidate: Candidate, card: Card | None, calibration: Calibration
) -> float | None:
    if card is None:
        return None
    micro_batches = 2 if candidate.accumulates else 1
    return micro_batches * traced.tokens / step_seconds(trace, card) * calibration.speed
