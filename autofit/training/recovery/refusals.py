"""What recovery does not cover, refused by name before anything runs: never something silently different."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def check_supported(cls: type, args: Sequence[Any], kwargs: Mapping[str, Any], trainer: Any = None) -> None:
    """Looks at what a trainer is constructed with, or (with `trainer`) at what has been constructed.

    Raises:
        UsageError: what is not covered, and what to do instead.
    """
    for name, now in _RENAMED.items():
        if name in kwargs:
            raise UsageError(f"{cls.__name__}: argument {name} has become {now}")
    if trainer is None:
        return
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
            raise UsageError(f"{cls.__name__} does not cover {what}: {instead}")


def _is_unsloth(model: Any) -> bool:
    return any(type(module).__module__.startswith("unsloth") for module in model.modules()) or hasattr(
        model, "_unsloth_forward_prefetch_config"
    )
