"""What was measured less what was estimated, kept per kind of device and versions: a constant or two, no more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Corrections for one kind of card.

    Attributes:
        context_bytes: what the driver sees beyond the allocator: the CUDA context and its kernels.
        allocated_bytes: added to every estimate of allocated and reserved bytes.
        speed: measured tokens a second as a share of estimated ones.
    """

    context_bytes: int = 0
    allocated_bytes: int = 0
    speed: float = 1.0


# About 0.9 GiB on the H200 of the published rows; a card that was calibrated has its own.
UNCALIBRATED = Calibration(context_bytes=966_367_642)
ON_CPU = Calibration()
