"""Recomputing activations for a while, in a model that was built to keep them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from autofit.step.model import checkpointable_layers


def keeps_some(model: nn.Module) -> bool:
    """Whether there are layers that could recompute and do not."""
    return any(not layer.gradient_checkpointing for layer in checkpointable_layers(_base(model)))


@contextlib.contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """While it is open, all of a model's layers recompute their activations; then those that did before."""
    base = _base(model)
    layers = checkpointable_layers(base)
    flags = [layer.gradient_checkpointing for layer in layers]
    if not any(flags):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        base.disable_input_require_grads()  # only re-entrant checkpointing needs it
    try:
        for layer in layers:
            layer.gradient_checkpointing = True
        yield
    finally:
        if not any(flags):
            base.activation_checkpointing_disable()
        for layer, flag in zip(layers, flags, strict=True):
            layer.gradient_checkpointing = flag


def _base(model: nn.Module) -> Any:
    whole: Any = model
    return whole.get_base_model() if hasattr(model, "get_base_model") else whole
