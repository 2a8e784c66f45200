"""What a plan must know first, in a child of its own: the present device, the model's facts, the data's lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autofit.errors import AccessError, UsageError
from autofit.memory.device import detect_device
from autofit.space.models import hub_id, known_name
from autofit.space.source import ModelSource
from autofit.step.configs import is_bare_name
from autofit.step.data import load_data, prepare
from autofit.step.inspect import inspect_model
from autofit.step.tokenizer import LoadedTokenizer, load_tokenizer
from autofit.trial.phases import PhaseReport


def run_survey(request: dict[str, Any], report: PhaseReport) -> dict[str, Any]:
    """Looks at `model`, and at `data` unless that is None; writes nothing and needs no weights.

    Returns `model` (the folder as a full path, or the name), and the facts of `device`, `facts` (the model's) and
    `data` (None without), and notes for the user, as JSON.

    Raises:
        UsageError, DataError, AccessError: what loading the model, its tokenizer or the data says.
    """
    report("device")
    device = detect_device()
    report("model")
    folder = Path(request["model"]).expanduser()
    name = str(folder.resolve()) if folder.is_dir() else request["model"]
    source = ModelSource(model=name, random_weights=True, trust_remote_code=request["trust_remote_code"])
    facts = inspect_model(source)
    data, notes = None, []
    if request["data"] is not None:
        report("data")
        raw = load_data(request["data"])
        loaded = _tokenizer(source)
        prepared = prepare(raw, loaded.tokenizer)
        data, notes = prepared.facts.to_json(), [*loaded.notes, *prepared.notes]
    return {"model": name, "device": device.to_json(), "facts": facts.to_json(), "data": data, "notes": notes}


def _tokenizer(source: ModelSource) -> LoadedTokenizer:
    """The model's own; a known name's is on the hub, and where that is out of reach the lengths are in bytes."""
    name = known_name(source.model)
    if name is not None and is_bare_name(source.model):
        try:
            return load_tokenizer(hub_id(name))
        except (AccessError, UsageError):
            loaded = load_tokenizer(source.model, allow_byte_tokenizer=True)
            note = f"the tokenizer of {hub_id(name)} is out of reach: lengths are in bytes, about 4 times the tokens"
            return LoadedTokenizer(loaded.tokenizer, [note])
    return load_tokenizer(source.model, source.trust_remote_code, allow_byte_tokenizer=True)
