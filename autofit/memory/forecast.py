"""The job that estimates many candidates of one model, in a child process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autofit.errors import UsageError
from autofit.memory.calibration import Calibration
from autofit.memory.derive import estimate_many, side_by_side
from autofit.memory.estimate import Estimate
from autofit.memory.link import with_link
from autofit.space.candidate import Candidate
from autofit.space.cards import card_of
from autofit.space.facts import DeviceFacts
from autofit.space.source import ModelSource

_TOLD = ("peak_allocated_bytes", "peak_reserved_bytes", "device_bytes", "tokens_per_second", "bracket")


def run_forecast(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    """Estimates `candidates` of the `source` on the `device`, corrected by `calibration` (None: as it comes).

    Returns:
        {"estimates": [{the peaks, tokens_per_second, bracket}, or {"error"}, one for each candidate]}.
    """
    report("estimate")
    given = request["calibration"]
    device = DeviceFacts.from_json(request["device"])
    candidates = [Candidate.from_json(candidate) for candidate in request["candidates"]]
    calibration = Calibration(**given) if given is not None else None
    with side_by_side() as pool:
        answers = estimate_many(candidates, ModelSource(**request["source"]), device, calibration, pool)
    found = {c: a for c, a in zip(candidates, answers, strict=True) if not isinstance(a, UsageError)}
    card = card_of(device.name, device.total_bytes) if device.type == "cuda" else None
    if card is not None:
        found = dict(with_link(list(found.items()), card))
    return {
        "estimates": [
            _told(found[c]) if c in found else {"error": str(a)} for c, a in zip(candidates, answers, strict=True)
        ]
    }


def _told(found: Estimate) -> dict[str, Any]:
    return {name: getattr(found, name) for name in _TOLD}
