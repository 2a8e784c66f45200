"""What recovery does not cover, refused by name before anything runs: never something silently different."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

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
        f"{arguments.n_gpu} GPUs in one process": (arguments.n_gpu > 1, "show it one, by CUDA_VISIBLE_DEVICES"),
        "FSDP": (trainer.is_fsdp_enabled, "run without it"),
        "DeepSpeed": (trainer.is_deepspeed_enabled, "run without it"),
        f"a model spread over {', '.join(sorted(devices))}": (len(devices) > 1, 'load it with device_map={"": 0}'),
        f"optim {optimizer}": (optimizer in _STEPS_IN_BACKWARD, "take an optimizer that steps after the backward pass"),
        "a model patched by Unsloth": (_is_unsloth(trainer.model), "load it with transformers"),
        **(_refused_of_several(trainer) if arguments.world_size > 1 else {}),
    }
    for what, (found, instead) in refused.items():
        if found:
            raise UsageError(f"{type(trainer).__name__} does not cover {what}: {instead}")


def _refused_of_several(trainer: Any) -> dict[str, tuple[bool, str]]:
    """What several processes may not do: other than DistributedDataParallel, or talk to each other within a step."""
    arguments, kind = trainer.args, str(trainer.accelerator.distributed_type.value)
    parallel = getattr(trainer.accelerator, "parallelism_config", None) is not None
    parallel = parallel or bool(getattr(trainer, "is_distributed_loading_by_transformers", False))
    batch_norm = any(isinstance(module, nn.SyncBatchNorm) for module in trainer.model.modules())
    several = f"with {arguments.world_size} processes"
    return {
        f"{kind} {several}": (not kind.startswith("MULTI_"), "run them under torchrun or accelerate launch"),
        f"a model split {several}": (parallel, "give each the whole model"),
        f"torch_compile {several}": (bool(arguments.torch_compile), "run without it"),
        f"SyncBatchNorm {several}": (batch_norm, "take the plain layer"),
        f"save_on_each_node {several}": (arguments.save_on_each_node, "give the nodes one output_dir that they share"),
    }


def _is_unsloth(model: Any) -> bool:
    """Unsloth puts forwards of its own into transformers' classes."""
    kinds = {type(module) for module in model.modules()}
    homes = [home for kind in kinds for home in (kind.__module__, getattr(kind.forward, "__module__", None))]
    return any(home is not None and home.startswith("unsloth") for home in homes)
