"""Many candidates of one model on one device."""

from __future__ import annotations

from collections.abc import Sequence

from autofit.errors import UsageError
from autofit.memory.calibration import Calibration
from autofit.memory.estimate import Estimate, estimate
from autofit.space.candidate import Candidate
from autofit.space.facts import DeviceFacts
from autofit.space.source import ModelSource


def estimate_many(
    candidates: Sequence[Candidate],
    source: ModelSource,
    device: DeviceFacts,
    calibration: Calibration | None = None,
) -> list[Estimate | UsageError]:
    """The estimate of each candidate, in order; what rules a candidate out stands in its place."""
    found: list[Estimate | UsageError] = []
    for candidate in candidates:
        try:
            found.append(estimate(candidate, source, device, calibration))
        except UsageError as error:
            found.append(error)
    return found
