"""Measured rows as cases: those of benchmarks/data (its README says the format), and what `autofit probe` answers."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autofit.cases import Case, make_case
from autofit.errors import UsageError

DEFAULT_MODEL = "llama-3-8b"
_FIELDS = {
    "model",
    "bits",
    "rank",
    "seq",
    "mb",
    "ckpt",
    "offload",
    "prepare_kbit",
    "double_quant",
    "dropout",
    "optim",
    "face",
    "targets",
}
_NEEDED = ("bits", "rank", "seq", "mb", "ckpt", "optim", "peak_allocated")
# Measured, or about the measurement.
_RESULTS = {
    "model_allocated",
    "base_allocated",
    "peak_allocated",
    "peak_reserved",
    "step_s",
    "tokens_per_s",
    "trainable",
    "timed",
}


@dataclass(frozen=True)
class MeasuredRow:
    """A case and what was measured of it: peaks in bytes; None where it was not. `line` is its place in the file."""

    line: int
    case: Case
    allocated: int
    reserved: int | None
    tokens_per_second: float | None


def read_rows(file: Path, card: str, scratch: Path, layers_of: Callable[[str], int]) -> list[MeasuredRow]:
    """The rows of a file; probed ones that did not end well are left out.

    A row's `model` is a folder beside the file, or what `NAME.config.json` beside it says, or a name.

    Args:
        card: what they were measured on.
        scratch: an empty folder, for the configs beside the file.
        layers_of: the checkpointable layers of a model.

    Raises:
        UsageError: a file that cannot be read, or a line that is no measured row; says which and why.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"rows {file}: {error.strerror or error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise UsageError("not a JSON object")
            if "error" in row:
                continue
            model = _model(row, file.parent, scratch)
            measured = _probed if "peak_allocated_bytes" in row else _published
            rows.append(measured(number, {**row, "model": model}, card, layers_of))
        except (ValueError, UsageError) as error:
            raise UsageError(f"rows {file}, line {number}: {error}") from error
    if not rows:
        raise UsageError(f"rows {file}: no measured row in it")
    return rows


def _probed(number: int, row: Mapping[str, Any], card: str, layers_of: Callable[[str], int]) -> MeasuredRow:
    """A line that `autofit probe --cases` wrote."""
    del layers_of
    fields = {name: row[name] for name in Case.model_fields if row.get(name) is not None}
    on_cpu = fields.get("device") == "cpu"
    case = make_case({**fields, "card": None if on_cpu else card})
    reserved = None if on_cpu else row.get("peak_reserved_bytes")
    return MeasuredRow(number, case, row["peak_allocated_bytes"], reserved, row.get("tokens_per_second"))


def _published(number: int, row: Mapping[str, Any], card: str, layers_of: Callable[[str], int]) -> MeasuredRow:
    missing = [name for name in _NEEDED if name not in row]
    if missing:
        raise UsageError(f"no {missing[0]}: a row has {', '.join(_NEEDED)}, or is an answer of autofit probe")
    unread = sorted(set(row) - _FIELDS - _RESULTS)
    if unread:
        print(f"line {number}: not read: {', '.join(unread)}", file=sys.stderr)
    case = make_case({**_as_case(row, layers_of), "card": card})
    return MeasuredRow(number, case, row["peak_allocated"], row.get("peak_reserved"), row.get("tokens_per_s"))


def _model(row: Mapping[str, Any], folder: Path, scratch: Path) -> str:
    name = str(row.get("model", DEFAULT_MODEL))
    if (folder / name).is_dir():
        return str(folder / name)
    config = folder / f"{name}.config.json"
    if not config.is_file():
        return name
    (scratch / name).mkdir(parents=True, exist_ok=True)
    (scratch / name / "config.json").write_bytes(config.read_bytes())
    return str(scratch / name)


def _as_case(row: Mapping[str, Any], layers_of: Callable[[str], int]) -> dict[str, Any]:
    layers, offload = _checkpointing(row["ckpt"], row["model"], layers_of)
    return {
        "model": row["model"],
        "quantization_bits": row["bits"],
        "double_quant": row.get("double_quant", True),
        "lora_rank": row["rank"],
        "dtype": "bfloat16",
        "lora_targets": row.get("targets", "all-linear"),
        "lora_dropout": row.get("dropout", 0.0),
        "max_seq_length": row["seq"],
        "micro_batch_size": row["mb"],
        "checkpointed_layers": layers,
        "offload_activations": "all" if row.get("offload") else offload,
        "prepare_kbit": row.get("prepare_kbit", False),
        "optimizer": row["optim"],
        "step": row.get("face", "sft"),
    }


def _checkpointing(asked: Any, model: str, layers_of: Callable[[str], int]) -> tuple[int | str, str]:
    """`checkpointed_layers` and `offload_activations` of true, false or transformers' checkpointing arguments."""
    if isinstance(asked, bool):
        return "all" if asked else "none", "none"
    if not isinstance(asked, dict) or set(asked) - {"every_n_layers", "offload"}:
        raise UsageError(f"ckpt {asked!r}: must be true, false or a dict of every_n_layers and offload")
    every = asked.get("every_n_layers", 1)
    layers: int | str = "all" if every == 1 else math.ceil(layers_of(model) / every)
    return layers, "checkpoints" if asked.get("offload") else "none"
