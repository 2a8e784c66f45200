"""The job that estimates many candidates of one model, in a child process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autofit.memory.calibration import Calibration
from autofit.memory.derive import estimate_many
from autofit.memory.estimate import Estimate
from autofit.space.candidate import Candidate
from autofit.space.facts import DeviceFacts
from autofit.space.source import ModelSource

_TOLD = ("peak_allocated_bytes", "peak_reserved_bytes", "device_bytes", "tokens_per_second", "bracket")


def run_forecast(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    """Estimates `candidates` of the `source` on the `device`, corrected by `calibration` (None: as it comes).

    Returns:
        {"estimates": [{the peaks, tokens_per_second, bracket}, or {"error"}, one for each candidate]}.
    """
    report("estimate")
    calibration = request["calibration"]
    found = estimate_many(
        [Candidate.from_json(candidate) for candidate in request["candidates"]],
        ModelSource(**request["source"]),
        DeviceFacts.from_json(request["device"]),
        Calibration(**calibration) if calibration is not None else None,
    )
    return {"estimates": [_told(one) for one in found]}


def _told(found: Estimate | Exception) -> dict[str, Any]:
    if isinstance(found, Exception):
        return {"error": str(found)}
    return {name: getattr(found, name) for name in _TOLD}
