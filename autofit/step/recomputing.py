"""Recomputing activations for a while, in a model that was built to keep them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from autofit.step.model import checkpointable_layers


def keeps_some(model: nn.Module) -> bool:
    """Whether there are layers that could recompute and do not."""
    return any(not layer.gradient_checkpointing for layer in _layers(model))


@contextlib.contextmanager
def recomputing(model: nn.Module, offload: bool = False) -> Iterator[None]:
    """While it is open, all of a model's layers that can recompute their activations; then those that did before.

    Args:
        offload: what the layers keep for that goes to pinned host memory, as with transformers' `offload=True`.
    """
    layers = _layers(model)
    before = [(layer.gradient_checkpointing, vars(layer).get("_gradient_checkpointing_func")) for layer in layers]
    try:
        for layer, (flag, function) in zip(layers, before, strict=True):
            # What is left of a function where it was switched off may be re-entrant: without gradients of its inputs.
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = _on_host if offload else function if flag else _recomputed
        yield
    finally:
        for layer, (flag, function) in zip(layers, before, strict=True):
            layer.gradient_checkpointing = flag
            if function is None:
                del layer._gradient_checkpointing_func
            else:
                layer._gradient_checkpointing_func = function


_recomputed: Callable[..., Any] = partial(checkpoint, use_reentrant=False)


def _on_host(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with save_on_cpu(pin_memory=True):
        return _recomputed(function, *args, **kwargs)


def _layers(model: nn.Module) -> list[Any]:
    """Those that recompute already, and all that can: batch norm would count the second pass in its statistics."""
    layers: list[Any] = list(checkpointable_layers(_base(model)))
    return [layer for layer in layers if layer.gradient_checkpointing or not _counts_passes(layer)]


def _counts_passes(layer: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in layer.modules())


def _base(model: nn.Module) -> Any:
    whole: Any = model
    return whole.get_base_model() if hasattr(model, "get_base_model") else whole
