"""What decides a run's result, so that another run does not go on from its checkpoint unnoticed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from autofit.training.recovery.contents import hash_made_rows, hash_rows
from autofit.training.resume import states_of

# Of the arguments, those that a result depends on; how batches are split, moved, logged and saved is free.
_DECIDING = (
    "seed",
    "data_seed",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim_args",
    "optim_target_modules",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "fp16",
    "bf16",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "train_sampling_strategy",
    "dataloader_drop_last",
    # of SFTConfig
    "loss_type",
    "max_length",
    "truncation_mode",
    "packing",
    "packing_strategy",
    "completion_only_loss",
    "assistant_only_loss",
    "router_aux_loss_coef",
)
_OF_ADAPTERS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
# Larger data are looked at in places.
_MOST_DATA_BYTES = 2**31
_ROWS = 1000
_PLACES = 200
# Values of each frozen tensor that are looked at.
_VALUES = 64


def identity(trainer: Any) -> dict[str, dict[str, Any]]:
    """The data, the arguments and the base that a trainer trains with; JSON. Takes no random number."""
    optimizer = states_of(getattr(trainer, "_optim", None) or trainer.args.optim)
    found = {
        "arguments": {**_arguments(trainer.args), "optim": optimizer},
        "base": _base(trainer.model),
        "data": _data(trainer.train_dataset),
    }
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(found, default=lambda value: str(value)))
    return plain


def first_difference(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> str | None:
    """In words; None where there is none. What is known of one of them alone is no difference."""
    for part in now:
        was = before.get(part, {})
        for name, value in now[part].items():
            if name in was and was[name] != value:
                return f"{name} was {was[name]!r} and is {value!r}"
    return None


def samples_done(trainer: Any) -> int:
    """How many samples the steps so far have taken, epochs of all of them counted one after the other."""
    arguments, steps = trainer.args, trainer.state.global_step
    rows, accumulated = arguments.train_batch_size * arguments.world_size, arguments.gradient_accumulation_steps
    examples = _length(trainer.train_dataset)
    if not examples:
        return int(steps * rows * accumulated)
    batches = examples // rows if arguments.dataloader_drop_last else -(-examples // rows)
    in_epoch = batches * rows if arguments.dataloader_drop_last else examples
    epochs, rest = divmod(steps, max(1, -(-batches // accumulated)))
    return int(epochs * in_epoch + min(rest * rows * accumulated, in_epoch))


def _arguments(arguments: Any) -> dict[str, Any]:
    found = {name: getattr(arguments, name) for name in _DECIDING if hasattr(arguments, name)}
    rows = arguments.train_batch_size * arguments.world_size
    found["samples in a step"] = rows * arguments.gradient_accumulation_steps
    if arguments.max_steps <= 0:
        found["num_train_epochs"] = float(arguments.num_train_epochs)
    if arguments.dataloader_drop_last:  # of the last batches then: how many there are depends on the split
        found["per_device_train_batch_size"] = rows
    return {name: getattr(value, "value", value) for name, value in found.items()}


def _base(model: nn.Module) -> dict[str, Any]:
    """Names and shapes of all parameters; values, a few of each, of the frozen ones only."""
    layout, values = hashlib.sha256(), hashlib.sha256()
    for name, parameter in model.named_parameters():
        layout.update(f"{name} {tuple(parameter.shape)} {parameter.requires_grad}\n".encode())
        if not parameter.requires_grad and not parameter.is_meta:
            flat = parameter.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // _VALUES)][:_VALUES].contiguous().cpu()
            values.update(some.view(torch.uint8).numpy().tobytes())
    found = {"the parameters' layout": layout.hexdigest(), "the frozen base": values.hexdigest()}
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        for key in _OF_ADAPTERS:
            if hasattr(config, key):
                found[f"{key} of adapter {name}"] = getattr(config, key)
    return found


def _data(dataset: Any) -> dict[str, Any]:
    """Length and contents; of data that are others each time they are read, the length alone."""
    found: dict[str, Any] = {"examples": _length(dataset)}
    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        found["the data"] = _hash_dataset(dataset)
    elif isinstance(dataset, (list, tuple)):
        found["the data"] = hash_rows(dataset)
    elif found["examples"] and hasattr(dataset, "__getitem__"):
        made = hash_made_rows(dataset)
        found |= {} if made is None else {"the data": made}
    return found


def _hash_dataset(dataset: Dataset) -> str:
    """Of the rows in their order, whatever files they are in."""
    import pyarrow as pa

    tables = dataset.with_format("arrow")
    starts = range(0, len(dataset), _ROWS)
    if (dataset.data.nbytes or 0) > _MOST_DATA_BYTES:
        starts = starts[:: max(1, len(starts) // _PLACES)]
    found = _Hash()
    for start in starts:
        table = tables[start : start + _ROWS].combine_chunks()
        # Taken row by row, equal rows have equal bytes, whatever they were cut from.
        table = table.take(pa.array(range(table.num_rows))).combine_chunks().replace_schema_metadata(None)
        with pa.ipc.new_stream(found, table.schema) as stream:
            stream.write_table(table, max_chunksize=_ROWS)
    return found.hash.hexdigest()


class _Hash:
    """A file that keeps nothing but the hash of what is written to it."""

    closed = False

    def __init__(self) -> None:
        self.hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return len(data)

    def flush(self) -> None: ...

    def close(self) -> None: ...


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None
