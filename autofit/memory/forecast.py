"""The job that estimates many candidates of one model, in a child process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autofit.errors import UsageError
from autofit.memory.calibration import Calibration
from autofit.memory.derive import estimate_many, side_by_side
from autofit.memory.estimate import Estimate
from autofit.memory.forms import combined, forms_of
from autofit.memory.link import with_link
from autofit.space.candidate import Candidate
from autofit.space.cards import card_of
from autofit.space.facts import DeviceFacts
from autofit.space.source import ModelSource

_TOLD = (
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "device_bytes",
    "tokens_per_second",
    "bracket",
    "breakdown_bytes",
)


def run_forecast(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    """Estimates `candidates` of the `source` on the `device`, corrected by `calibration` (None: as it comes).

    `checkpointable_layers` are the model's.

    Returns:
        {"estimates": [{what of its `Estimate` is told}, or {"error"}, one for each candidate]}.
    """
    report("estimate")
    given = request["calibration"]
    device = DeviceFacts.from_json(request["device"])
    candidates = [Candidate.from_json(candidate) for candidate in request["candidates"]]
    calibration = Calibration(**given) if given is not None else None
    layers, offloads = request["checkpointable_layers"], device.type == "cuda"
    forms = {c: forms_of(c, layers, offloads) for c in candidates}
    asked = list(dict.fromkeys(form for some in forms.values() for form in some))
    with side_by_side() as pool:
        answers = estimate_many(asked, ModelSource(**request["source"]), device, calibration, pool)
    errors = {c: str(a) for c, a in zip(asked, answers, strict=True) if isinstance(a, UsageError)}
    found = {c: a for c, a in zip(asked, answers, strict=True) if isinstance(a, Estimate)}
    card = card_of(device.name, device.total_bytes) if device.type == "cuda" else None
    if card is not None:
        found = dict(with_link(list(found.items()), card))
    return {"estimates": [_told(forms[c], found, errors) for c in candidates]}


def _told(
    forms: tuple[Candidate, ...], found: dict[Candidate, Estimate], errors: dict[Candidate, str]
) -> dict[str, Any]:
    why = [errors[form] for form in forms if form in errors]
    if why:
        return {"error": why[0]}
    most = combined(forms, found)
    return {name: getattr(most, name) for name in _TOLD}
