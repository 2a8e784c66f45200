"""Which layers get an adapter, and the names they are called by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

ALL_LINEAR = "all-linear"


def target_modules(base: PreTrainedModel, asked: tuple[str, ...]) -> str | list[str]:
    """What PEFT is asked to adapt, for `lora_targets` as a candidate has them.

    Its own "all-linear", or where that would fail the names of what remains without the layers that it cannot train.
    """
    if asked != (ALL_LINEAR,):
        return list(asked)
    head = base.get_output_embeddings()
    linears = {p: m for p, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
    trainable = [path for path, module in linears.items() if _can_train(base, path, module)]
    if len(trainable) == len(linears):
        return ALL_LINEAR
    return shortest_names(trainable, (path for path, _ in base.named_modules() if path))


def _can_train(base: PreTrainedModel, path: str, module: nn.Module) -> bool:
    try:
        # State-space layers read the weights of some projections without calling them.
        _check_lora_target_modules_mamba(LoraConfig(), base, path.rpartition(".")[2])
    except ValueError:
        return False
    return _maps_rows_to_rows(module)


def _maps_rows_to_rows(module: nn.Module) -> bool:
    """Whether a linear layer does what its class promises: some routers answer a tuple, some layers work in groups."""
    if not isinstance(module, nn.Linear) or not type(module).__module__.startswith("transformers.models."):
        return True
    row = torch.zeros(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    try:
        with torch.no_grad():
            out = module(row)
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(out, torch.Tensor) and out.shape == (1, module.out_features)


def lora_targets_used(model: PeftModel) -> list[str]:
    """The adapted layers as `lora_targets` would name them, sorted: with these names PEFT adapts the same again.

    The shortest names that say so (see `shortest_names`). Where transformers fuses a mixture's experts into tensors,
    PEFT reads the names that their projections once had (`gate_proj`) as those tensors; so they are given here.
    """
    base = model.get_base_model()
    adapted = {path: layer for path, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
    inside = tuple(f"{path}." for path in adapted)
    every = [path for path, _ in base.named_modules() if path and not path.startswith(inside)]
    layers = [path for path, layer in adapted.items() if not isinstance(layer, ParamWrapper)]
    return sorted({*shortest_names(layers, every), *_names_of_fused(model)})


def _names_of_fused(model: PeftModel) -> set[str]:
    base: Any = model.get_base_model()
    family = _MODEL_TO_CONVERSION_PATTERN.get(base.config.model_type, "")
    fused = getattr(model.peft_config["default"], "target_parameters", None) or ()
    return {name for name, tensor in _MOE_TARGET_MODULE_MAPPING.get(family, {}).items() if tensor in fused}


def shortest_names(chosen: Iterable[str], every: Iterable[str]) -> list[str]:
    """The shortest ends of paths (whole parts: `q_proj`, `mlp.0`) that match all of `chosen` and nothing else.

    A name matches a path that is it or ends in a dot and it, as in PEFT.
    """
    chosen = list(chosen)
    ends = Counter(end for path in every for end in _ends(path))
    wanted = Counter(end for path in chosen for end in _ends(path))
    return sorted({next(end for end in _ends(path) if ends[end] == wanted[end]) for path in chosen})


def _ends(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
