"""The first job of a run, in a child of its own: the device, the model's facts, tokenizer and data on disk."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from autofit.errors import UsageError
from autofit.memory.device import detect_device
from autofit.space.facts import ModelFacts
from autofit.space.source import ModelSource
from autofit.step.configs import require_weights
from autofit.step.data import RawData, data_facts, load_data, prepare, split_eval
from autofit.step.default_model import save_default_model
from autofit.step.inspect import has_weights, inspect_model
from autofit.step.tokenizer import LoadedTokenizer, byte_tokenizer, load_tokenizer
from autofit.trial.phases import PhaseReport


def run_preparation(request: dict[str, Any], report: PhaseReport) -> dict[str, Any]:
    """Writes `work/tokenizer`, `work/data` (and `base/` for the embedded model) into request["folder"].

    Returns the source and the facts of device, model and data, and notes for the user, as JSON.

    Raises:
        UsageError, DataError, AccessError: what loading the model, its tokenizer or the data says.
    """
    folder = Path(request["folder"])
    work = folder / "work"
    report("device")
    device = detect_device()
    report("model")
    source, loaded = _model(request, folder / "base")
    model = inspect_model(source)
    report("data")
    raw = load_data(request["data"])
    prepared = prepare(raw, loaded.tokenizer)
    train, evaluation = split_eval(prepared.dataset, request["eval_fraction"], request["seed"])
    splits = DatasetDict({"train": train} if evaluation is None else {"train": train, "eval": evaluation})
    splits.save_to_disk(work / "data")
    loaded.tokenizer.save_pretrained(work / "tokenizer")
    facts = data_facts(train, prepared.facts.dropped_examples)
    return {
        "source": asdict(source),
        "model": model.to_json(),
        "data": facts.to_json(),
        "device": device.to_json(),
        "notes": [*loaded.notes, *prepared.notes, *_defaults_taken(request, raw), *_loss_taken(model)],
    }


def _defaults_taken(request: dict[str, Any], raw: RawData) -> list[str]:
    notes = []
    if request["model"] is not None and request["data"] is None:
        notes.append("no --data: this trains on the embedded docstrings of Python's standard library")
    if request["model"] is None and request["data"] is not None:
        notes.append("no --model: this trains the embedded model of about 1 M random parameters")
    if "messages" in raw.dataset.column_names:
        notes.append("every turn of a conversation is trained, the user's too; prompt/completion trains answers only")
    return notes


def _loss_taken(model: ModelFacts) -> list[str]:
    if model.chunked_loss:
        return []
    return [f"loss full: {model.architecture} does not make its logits in one product"]


def _model(request: dict[str, Any], base: Path) -> tuple[ModelSource, LoadedTokenizer]:
    if request["model"] is None:
        tokenizer = byte_tokenizer()
        save_default_model(base, tokenizer, request["seed"])
        return ModelSource(model=str(base)), LoadedTokenizer(tokenizer, [])
    folder = Path(request["model"]).expanduser()
    source = ModelSource(
        model=str(folder.resolve()) if folder.is_dir() else request["model"],
        random_weights=request["random_weights"],
        trust_remote_code=request["trust_remote_code"],
    )
    if folder.is_dir() and not source.random_weights and not has_weights(source.model):
        raise UsageError(f"model {request['model']}: the folder has no weights; --random-weights makes some up")
    require_weights(source)
    loaded = load_tokenizer(source.model, source.trust_remote_code, allow_byte_tokenizer=source.random_weights)
    if source.random_weights:
        loaded.notes.append("the base weights are random: this measures and exercises, it teaches nothing")
    return source, loaded
