"""From one candidate as it is asked for to the candidate that runs, once the model and the device are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from autofit.errors import UsageError
from autofit.space.candidate import Candidate
from autofit.space.facts import DeviceFacts, ModelFacts, can_pack

# What a candidate has where neither it nor the model's positions say anything else.
DEFAULT_LENGTH = 2048


def settle(
    asked: Mapping[str, Any], model: ModelFacts, device: DeviceFacts, dtype: str
) -> tuple[Candidate, tuple[str, ...]]:
    """The candidate that `asked` means on this model and device, and notes for the user.

    Args:
        asked: a candidate's fields; those that are missing or None take the project's defaults (4 bits on a GPU,
            16 on a CPU, a quantized checkpoint its own). `checkpointed_layers` may also be "all" or "none".
        dtype: the device's default.

    Raises:
        UsageError: a value that the model or the device rules out.
    """
    known = {f.name for f in fields(Candidate)}
    values = {name: value for name, value in asked.items() if name in known and value is not None}
    notes: list[str] = []
    values.setdefault("dtype", dtype)
    values["attention"] = model.attention
    values["quantization_bits"] = _bits(values.get("quantization_bits"), model, device)
    values["max_seq_length"] = _length(values.get("max_seq_length"), model, notes)
    values["checkpointed_layers"] = _layers(values.get("checkpointed_layers", 0), model, notes)
    if not model.chunked_loss and values.get("loss") != "full":
        values["loss"] = "full"
        notes.append(f"loss full: {model.architecture} does not make its logits in one product")
    _check_device(values, device)
    if values.get("layout") == "packed":
        _check_packing(values["dtype"], model, device)
    try:
        return Candidate(**values), tuple(notes)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _bits(asked: int | None, model: ModelFacts, device: DeviceFacts) -> int:
    if model.quantized_bits is not None:
        if asked not in (None, model.quantized_bits):
            raise UsageError(
                f"quantization_bits {asked}: the checkpoint is already quantized to {model.quantized_bits} bits"
            )
        return model.quantized_bits
    return asked or (16 if device.type == "cpu" else 4)


def _length(asked: int | None, model: ModelFacts, notes: list[str]) -> int:
    if asked is None:
        return min(DEFAULT_LENGTH, model.max_positions or DEFAULT_LENGTH)
    if model.max_positions is not None and asked > model.max_positions:
        notes.append(f"max_seq_length {asked} is beyond the model's {model.max_positions} positions")
    return asked


def _layers(asked: int | str, model: ModelFacts, notes: list[str]) -> int:
    layers = model.checkpointable_layers
    if asked in (0, "none"):
        return 0
    if layers == 0:
        notes.append(f"{model.architecture} cannot checkpoint: 0 layers are")
        return 0
    if isinstance(asked, str):
        return layers
    if asked > layers:
        raise UsageError(f"checkpointed_layers {asked}: the model has {layers} layers that can be checkpointed")
    return asked


def _check_packing(dtype: str, model: ModelFacts, device: DeviceFacts) -> None:
    size = model.packed_head_size
    if size is None:
        raise UsageError(f"layout packed: the attention of {model.architecture} cannot keep sequences apart in a row")
    if device.type != "cpu" and not can_pack(model, device, dtype):
        raise UsageError(f"layout packed: {device.name} has no such attention for {dtype} and heads of {size}")


def _check_device(values: Mapping[str, Any], device: DeviceFacts) -> None:
    """A CPU has no other memory to put things in."""
    if device.type != "cpu":
        return
    if values.get("offload_activations", "none") != "none":
        raise UsageError(
            f"offload_activations {values['offload_activations']}: on a CPU there is nowhere to offload to"
        )
    if str(values.get("optimizer", "")).startswith("paged"):
        raise UsageError(f"optimizer {values['optimizer']}: on a CPU there is nowhere to page to")
