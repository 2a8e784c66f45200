"""A calibration, told on a terminal."""

from __future__ import annotations

from autofit.memory.calibration import Calibration
from autofit.report.words import candidate_words
from autofit.space.units import format_bytes
from autofit.training.calibrating import Errors, Sample


def sample_words(sample: Sample) -> str:
    """One probe: what it was, measured and estimated."""
    measured, estimated = sample.measured, sample.estimated
    speed = f", {measured.tokens_per_second:,.0f} tokens/s" if measured.tokens_per_second else ""
    if estimated.tokens_per_second:
        speed += f" (estimated {estimated.tokens_per_second:,.0f})"
    return (
        f"{sample.model}: {candidate_words(sample.candidate)}  {format_bytes(measured.device_bytes)} "
        f"(estimated {format_bytes(estimated.device_bytes)}){speed}"
    )


def calibration_words(calibration: Calibration) -> str:
    """The constants."""
    return (
        f"context {format_bytes(calibration.context_bytes)}, tensors {calibration.allocated_bytes:+,} bytes, "
        f"speed × {calibration.speed:.2f}"
    )


def errors_words(found: Errors) -> str:
    """How far off: the median, and the worst."""
    text = "memory off by {:.2%}, at most {:.2%}".format(*found.device_bytes)
    if found.tokens_per_second is not None:
        text += "; speed by {:.0%}, at most {:.0%}".format(*found.tokens_per_second)
    return text
