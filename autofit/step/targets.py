"""Which layers get an adapter, and the names they are called by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def trainable_linears(base: PreTrainedModel) -> list[str]:
    """Paths of every linear layer that PEFT can train, in order, without the output layer.

    What PEFT itself means by "all-linear", less what it then refuses: the projections that state-space layers read
    the weights of without calling them.
    """
    head = base.get_output_embeddings()
    return [
        path
        for path, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and _accepts(base, path)
    ]


def _accepts(base: PreTrainedModel, path: str) -> bool:
    try:
        _check_lora_target_modules_mamba(LoraConfig(), base, path.rpartition(".")[2])
    except ValueError:
        return False
    return True


def adapted_layers(model: PeftModel) -> list[str]:
    """Paths of the layers that have an adapter, in the base model's own names."""
    return [path for path, module in model.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)]


def lora_targets_used(model: PeftModel) -> list[str]:
    """The adapted layers as `lora_targets` would name them: sorted, see `shortest_names`."""
    inside = tuple(f"{path}." for path in adapted_layers(model))
    every = [path for path, _ in model.get_base_model().named_modules() if path and not path.startswith(inside)]
    return shortest_names(adapted_layers(model), every)


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
