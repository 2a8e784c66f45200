"""What recovery does not cover, refused by name before anything runs: never something silently different."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autofit.errors import UsageError

# Arguments of older releases, and what they are called now.
_RENAMED = {
    "tokenizer": "processing_class",
    "max_seq_length": "max_length, of SFTConfig",
    "dataset_text_field": "dataset_text_field, of SFTConfig",
    "packing": "packing, of SFTConfig",
}
# Their step happens inside the backward pass, where it cannot be undone.
_STEPS_IN_BACKWARD = ("lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise")


def check_arguments(cls: type, kwargs: Mapping[str, Any]) -> None:
    """Looks at what a trainer is about to be constructed with.

    Raises:
        UsageError: an argument that has another name now.
    """
    for name, now in _RENAMED.items():
        if name in kwargs:
            raise UsageError(f"{cls.__name__}: argument {name} has become {now}")


def check_trainer(trainer: Any) -> None:
    """Looks at a trainer that has been constructed.

    Raises:
        UsageError: what recovery does not cover, and what to do instead.
    """
    arguments = trainer.args
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    devices = {str(device) for device in (getattr(trainer.model, "hf_device_map", None) or {}).values()}
    refused = {
        "auto_find_batch_size": (arguments.auto_find_batch_size, "leave it away: it changes the effective batch"),
        f"{arguments.world_size} processes": (arguments.world_size > 1, "run a single one"),
        f"{arguments.n_gpu} GPUs in one process": (arguments.n_gpu > 1, "show it one, by CUDA_VISIBLE_DEVICES"),
        "FSDP": (trainer.is_fsdp_enabled, "run without it"),
        "DeepSpeed": (trainer.is_deepspeed_enabled, "run without it"),
        f"a model spread over {', '.join(sorted(devices))}": (len(devices) > 1, 'load it with device_map={"": 0}'),
        f"optim {optimizer}": (optimizer in _STEPS_IN_BACKWARD, "take an optimizer that steps after the backward pass"),
        "a model patched by Unsloth": (_is_unsloth(trainer.model), "load it with transformers"),
    }
    for what, (found, instead) in refused.items():
        if found:
            raise UsageError(f"{type(trainer).__name__} does not cover {what}: {instead}")


def _is_unsloth(model: Any) -> bool:
    """Unsloth puts forwards of its own into transformers' classes."""
    kinds = {type(module) for module in model.modules()}
    homes = [home for kind in kinds for home in (kind.__module__, getattr(kind.forward, "__module__", None))]
    return any(home is not None and home.startswith("unsloth") for home in homes)
