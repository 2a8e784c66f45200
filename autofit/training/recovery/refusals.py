"""What recovery does not cover, refused by name before anything runs: never something silently different."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from autofit.errors import UsageError

_OF_SFT_CONFIG = "is an argument of SFTConfig now: SFTConfig({}=…)"
_GONE = "is no argument any more: leave it away"
# Arguments of older releases, and what became of them.
_BEFORE = {
    "tokenizer": "has become processing_class",
    "max_seq_length": _OF_SFT_CONFIG.format("max_length"),
    "dataset_batch_size": _GONE,
    "num_of_sequences": _GONE,
    "chars_per_token": _GONE,
    **{
        name: _OF_SFT_CONFIG.format(name)
        for name in (
            "dataset_text_field",
            "dataset_kwargs",
            "dataset_num_proc",
            "packing",
            "eval_packing",
            "neftune_noise_alpha",
            "model_init_kwargs",
        )
    },
}
# Their step happens inside the backward pass, where it cannot be undone; so with all whose name ends in "layerwise".
_STEPS_IN_BACKWARD = ("lomo", "adalomo")


def check_arguments(cls: type, kwargs: Mapping[str, Any]) -> None:
    """Looks at what a trainer is about to be constructed with.

    Raises:
        UsageError: an argument that has another name or place now, or none; a class that Unsloth has patched.
    """
    for name, became in _BEFORE.items():
        if name in kwargs:
            raise UsageError(f"{cls.__name__}: argument {name} {became}")
    patched = _patched_class(cls)
    if patched is not None:
        raise UsageError(f"{cls.__name__} does not cover {patched}, patched by Unsloth: import autofit without unsloth")


def check_training_arguments(cls: type, arguments: Any) -> None:
    """Looks at a trainer's `args`, for which there need not be a model yet.

    Raises:
        UsageError: what recovery does not cover, and what to do instead.
    """
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    refused = {
        "auto_find_batch_size": (arguments.auto_find_batch_size, "leave it away: it changes the effective batch"),
        f"optim {optimizer}": (
            optimizer in _STEPS_IN_BACKWARD or optimizer.endswith("_layerwise"),
            "take an optimizer that steps after the backward pass",
        ),
    }
    _refuse(cls, refused)


def check_trainer(trainer: Any) -> None:
    """Looks at a trainer that has been constructed.

    Raises:
        UsageError: what recovery does not cover, and what to do instead.
    """
    arguments = trainer.args
    check_training_arguments(type(trainer), arguments)
    devices = {str(device) for device in (getattr(trainer.model, "hf_device_map", None) or {}).values()}
    refused = {
        f"{arguments.n_gpu} GPUs in one process": (arguments.n_gpu > 1, "show it one, by CUDA_VISIBLE_DEVICES"),
        "FSDP": (trainer.is_fsdp_enabled, "run without it"),
        "DeepSpeed": (trainer.is_deepspeed_enabled, "run without it"),
        f"a model spread over {', '.join(sorted(devices))}": (len(devices) > 1, 'load it with device_map={"": 0}'),
        "a model patched by Unsloth": (_is_unsloth(trainer.model), "load it with transformers"),
        **(_refused_of_several(trainer) if arguments.world_size > 1 else {}),
    }
    _refuse(type(trainer), refused)


def _refuse(cls: type, refused: Mapping[str, tuple[bool, str]]) -> None:
    for what, (found, instead) in refused.items():
        if found:
            raise UsageError(f"{cls.__name__} does not cover {what}: {instead}")


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
    return any(_of_unsloth(kind) or _of_unsloth(kind.forward) for kind in kinds)


def _patched_class(cls: type) -> str | None:
    """A base that is Unsloth's, or has steps or methods of it; None where there is none.

    It puts classes of its own in the place of TRL's, and functions into transformers' Trainer.
    """
    for base in cls.__mro__:
        if _of_unsloth(base) or base.__name__.startswith(("Unsloth", "_Unsloth")):
            return base.__name__
        method = next((name for name, value in vars(base).items() if callable(value) and _of_unsloth(value)), None)
        if method is not None:
            return f"{base.__name__}.{method}"
    return None


def _of_unsloth(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).startswith("unsloth")
