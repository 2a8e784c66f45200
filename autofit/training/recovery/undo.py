"""What a failed attempt at a step has touched besides gradients, and how to put it back."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import nn

# Larger buffers are tables that no forward pass writes to.
_LARGEST_BUFFER = 2**20
# Running figures of TRL's trainers, which count the tokens of failed attempts, too; and what is kept for other ranks.
_FIGURES = ("_metrics", "_total_train_tokens", "_gathered")


class Snapshot:
    """Random states, buffers and running figures of a trainer at one moment."""

    def __init__(self, trainer: Any, model: nn.Module) -> None:
        self._trainer = trainer
        self._random = (torch.get_rng_state(), random.getstate(), np.random.get_state())
        # Of this process's device: asking all of them would put a context on each.
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        # Batch norm changes its statistics without counting a version, so copies and no comparison.
        small = (buffer for buffer in model.buffers() if buffer.numel() < _LARGEST_BUFFER)
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in small]
        self._figures = {name: copy.deepcopy(getattr(trainer, name)) for name in _FIGURES if hasattr(trainer, name)}

    def restore(self) -> None:
        """Everything as it was; a snapshot can be restored more than once."""
        torch.set_rng_state(self._random[0])
        random.setstate(self._random[1])
        np.random.set_state(self._random[2])
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
        for buffer, kept in self._buffers:
            buffer.data.copy_(kept)
        for name, value in self._figures.items():
            setattr(self._trainer, name, copy.deepcopy(value))
        offloading: Any = getattr(self._trainer, "maybe_activation_offload_context", None)
        if hasattr(offloading, "tracker"):  # TRL's, in the middle of a pass
            offloading.tracker.clear()
            offloading.is_first_forward_call = True
