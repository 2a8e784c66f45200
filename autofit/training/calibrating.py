"""From a handful of probes and their estimates to a calibration: constants of the device, none of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from autofit.errors import AutofitError
from autofit.memory.calibration import Calibration
from autofit.space.candidate import Candidate
from autofit.trial.result import TrialResult

# With fewer probes that fit, one odd one would decide.
_LEAST_SAMPLES = 2


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a candidate takes, measured or estimated: fields of a `TrialResult`."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    device_bytes: int
    tokens_per_second: float | None

    @property
    def context_bytes(self) -> int:
        """What the driver sees beyond the allocator."""
        return self.device_bytes - self.peak_reserved_bytes

    @classmethod
    def of_trial(cls, result: TrialResult) -> Figures:
        """Those of a trial that fits: the training steps' peaks, and the whole trial's on the device."""
        allocated, reserved, device = result.peak_allocated_bytes, result.peak_reserved_bytes, result.device_bytes
        if allocated is None or reserved is None or device is None:
            raise AutofitError(f"the probe measured nothing: {result.message}")
        return cls(
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=reserved,
            device_bytes=device,
            tokens_per_second=result.tokens_per_second,
        )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One probe beside its uncalibrated estimate."""

    model: str
    candidate: Candidate
    measured: Figures
    estimated: Figures

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        return {
            "model": self.model,
            "candidate": self.candidate.to_json(),
            "measured": vars(self.measured),
            "estimated": vars(self.estimated),
        }


@dataclass(frozen=True, kw_only=True)
class Errors:
    """How far estimates are from what was measured, as shares of it: the median and the worst, without their signs."""

    device_bytes: tuple[float, float]
    tokens_per_second: tuple[float, float] | None


def calibrate(samples: Sequence[Sample]) -> Calibration:
    """The calibration that takes the samples' estimates to what was measured, by medians.

    Raises:
        AutofitError: too few samples.
    """
    if len(samples) < _LEAST_SAMPLES:
        raise AutofitError(f"only {len(samples)} of the probes fit on the device; {_LEAST_SAMPLES} are needed")
    ratios = [
        s.measured.tokens_per_second / s.estimated.tokens_per_second
        for s in samples
        if s.measured.tokens_per_second and s.estimated.tokens_per_second
    ]
    beyond = [s.measured.peak_allocated_bytes - s.estimated.peak_allocated_bytes for s in samples]
    return Calibration(
        context_bytes=round(median(s.measured.context_bytes for s in samples)),
        allocated_bytes=round(median(beyond)),
        speed=median(ratios) if ratios else 1.0,
    )


def corrected(estimated: Figures, calibration: Calibration) -> Figures:
    """An uncalibrated estimate as it would have been with the calibration."""
    reserved = estimated.peak_reserved_bytes + calibration.allocated_bytes
    speed = estimated.tokens_per_second
    return replace(
        estimated,
        peak_allocated_bytes=estimated.peak_allocated_bytes + calibration.allocated_bytes,
        peak_reserved_bytes=reserved,
        device_bytes=reserved + calibration.context_bytes,
        tokens_per_second=None if speed is None else speed * calibration.speed,
    )


def errors(samples: Sequence[Sample], calibration: Calibration | None = None) -> Errors:
    """Those of the estimates as they come, or with a calibration."""
    sizes, speeds = [], []
    for sample in samples:
        measured, estimated = sample.measured, sample.estimated
        if calibration is not None:
            estimated = corrected(estimated, calibration)
        sizes.append(abs(estimated.device_bytes / measured.device_bytes - 1))
        if measured.tokens_per_second and estimated.tokens_per_second:
            speeds.append(abs(estimated.tokens_per_second / measured.tokens_per_second - 1))
    return Errors(
        device_bytes=(median(sizes), max(sizes)),
        tokens_per_second=(median(speeds), max(speeds)) if speeds else None,
    )
