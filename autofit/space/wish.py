"""The candidate that a search starts from: what the user asked for, and the best of everything where they did not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from autofit.errors import UsageError
from autofit.space.budget import MemoryBudget
from autofit.space.candidate import Candidate
from autofit.space.facts import DataFacts, DeviceFacts, ModelFacts, can_pack
from autofit.space.units import format_bytes


def make_wish(
    model: ModelFacts,
    data: DataFacts,
    budget: MemoryBudget,
    dtype: str,
    global_batch_size: int,
    asked: Mapping[str, Any],
    pins: Collection[str] = (),
    layout: str = "padded",
) -> Candidate:
    """The wish for a model, data and budget. `asked` are a candidate's fields that the user set.

    16 bits if the 16-bit weights take at most half the budget, else 4; a checkpoint that is already quantized keeps
    its bits. The whole global batch is one micro-batch of the data's longest sequence, up to the model's positions;
    a length beyond the data's is only kept where it is pinned. Where a few sequences are much longer than all others,
    micro-batches are made for the others.

    Raises:
        UsageError: a value that the model or the budget rules out.
    """
    values = {k: v for k, v in asked.items() if v is not None}
    positions = model.max_positions or data.longest
    values.setdefault("dtype", dtype)
    values["attention"] = model.attention
    values["layout"] = layout
    if not model.chunked_loss:
        values["loss"] = "full"
    values.setdefault("max_seq_length", positions)
    if values.get("tokens_per_micro_batch") is None and model.checkpointable_layers:
        values["pace_length"] = data.pace_length(values["max_seq_length"])
    if values.setdefault("micro_batch_size", global_batch_size) > global_batch_size:
        raise UsageError(
            f"micro_batch_size {values['micro_batch_size']} is more than the {global_batch_size} sequences of a step; "
            "raise global_batch_size if that is what you want"
        )
    # Even where one micro-batch would hold them all, unequal sequences are cheaper cut (`space.cut`).
    values["accumulates"] = global_batch_size > 1
    if model.quantized_bits is not None:
        if values.setdefault("quantization_bits", model.quantized_bits) != model.quantized_bits:
            raise UsageError(
                f"quantization_bits {values['quantization_bits']}: the checkpoint is already quantized to "
                f"{model.quantized_bits} bits"
            )
    else:
        fits_in_half = model.weight_bytes_16bit * 2 <= budget.total_bytes
        values.setdefault("quantization_bits", 16 if fits_in_half else 4)
    if values["max_seq_length"] > positions:
        raise UsageError(f"max_seq_length {values['max_seq_length']} is beyond the model's {positions} positions")
    if "max_seq_length" not in pins:
        values["max_seq_length"] = min(values["max_seq_length"], data.longest)
    if values.get("checkpointed_layers", 0) > model.checkpointable_layers:
        raise UsageError(
            f"checkpointed_layers {values['checkpointed_layers']}: "
            f"the model has {model.checkpointable_layers} layers that can be checkpointed"
        )
    try:
        return Candidate(**{k: v for k, v in values.items() if k in {f.name for f in fields(Candidate)}})
    except ValueError as error:
        raise UsageError(str(error)) from error


def choose_layout(model: ModelFacts, data: DataFacts, device: DeviceFacts, dtype: str) -> str:
    """Packed where sequences differ in length, and the device's attention can keep them apart in one row."""
    return "packed" if len(set(data.lengths)) > 1 and can_pack(model, device, dtype) else "padded"


def check_pins(wish: Candidate, pins: frozenset[str], model: ModelFacts, budget: MemoryBudget) -> None:
    """Refuses pinned bits whose weights alone exceed the budget, before anything runs.

    Raises:
        UsageError: naming the pin, what it needs and what would do.
    """
    weights = model.weight_bytes_16bit * wish.quantization_bits // 16
    if "quantization_bits" in pins and wish.dtype == "float32" and wish.quantization_bits == 16:
        weights *= 2
    if "quantization_bits" not in pins or weights <= budget.usable_bytes:
        return
    fitting = [b for b in (8, 4) if model.weight_bytes_16bit * b // 16 <= budget.usable_bytes]
    instead = f"{' or '.join(map(str, fitting))} bits would fit" if fitting else "no bits fit; use a larger budget"
    raise UsageError(
        f"pin quantization_bits={wish.quantization_bits}: the weights alone take {format_bytes(weights)} "
        f"of a budget of {format_bytes(budget.usable_bytes)}; {instead}"
    )
