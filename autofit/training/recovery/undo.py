"""What a failed attempt at a step has touched besides gradients, and how to put it back."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from autofit.errors import OutOfBudget

# Larger buffers are tables that hardly a forward pass writes to: no copies, but a look whether one did.
_LARGEST_BUFFER = 2**20
# Values of each tensor that is not kept which are compared.
_VALUES = 4
# Running figures of TRL's trainers, which count the tokens of failed attempts, too; and what is kept for other ranks.
_FIGURES = ("_metrics", "_total_train_tokens", "_gathered")


class RandomStates:
    """The generators that everybody draws from, at one moment; on the host, and of this process's device."""

    def __init__(self) -> None:
        self._random = (torch.get_rng_state(), random.getstate(), np.random.get_state())
        # Of this process's device: asking all of them would put a context on each.
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        """As they were; more than once, if need be."""
        torch.set_rng_state(self._random[0])
        random.setstate(self._random[1])
        np.random.set_state(self._random[2])
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)


class Snapshot:
    """Random states, buffers and running figures of a trainer at one moment."""

    def __init__(self, trainer: Any, model: nn.Module) -> None:
        self._trainer = trainer
        self._random = RandomStates()
        # Batch norm changes its statistics without counting a version, so copies and no comparison.
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._weights: list[_Looked] = []
        self._others: list[_Looked] = []
        for name, buffer in model.named_buffers():
            if buffer.numel() < _LARGEST_BUFFER:
                self._buffers.append((buffer, buffer.detach().clone()))
            else:
                self._others.append(_Looked(name, buffer, _values(buffer)))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._weights.append(_Looked(name, parameter))
            elif not _is_quantized(parameter):
                self._others.append(_Looked(name, parameter, _values(parameter)))
        self._figures = {name: copy.deepcopy(getattr(trainer, name)) for name in _FIGURES if hasattr(trainer, name)}

    def restore(self, weights_moved: bool = False) -> None:
        """Everything as it was; a snapshot can be restored more than once.

        Args:
            weights_moved: the optimizer has moved the trained weights since, and back.

        Raises:
            OutOfBudget: what is not kept has changed, as a teacher does that follows the weights in the forward pass.
        """
        self._random.restore()
        for buffer, kept in self._buffers:
            buffer.data.copy_(kept)
        for name, value in self._figures.items():
            setattr(self._trainer, name, copy.deepcopy(value))
        offloading: Any = getattr(self._trainer, "maybe_activation_offload_context", None)
        if hasattr(offloading, "tracker"):  # TRL's, in the middle of a pass
            offloading.tracker.clear()
            offloading.is_first_forward_call = True
        changed = [one.name for one in (*self._others, *([] if weights_moved else self._weights)) if one.has_changed()]
        if changed:
            raise OutOfBudget(f"{changed[0]} changes in the forward pass and is not kept: again it would change twice")


class _Looked:
    """A tensor of which no copy is kept: whether it is written to after this moment.

    Writes to its `data` count no version; some of its values tell of those that are to all of it.
    """

    def __init__(self, name: str, tensor: torch.Tensor, values: torch.Tensor | None = None) -> None:
        self.name = name
        self._tensor, self._version, self._values = tensor, tensor._version, values
        self._kind = (tensor.dtype, tensor.device)
        # Addresses alone come again; this one does not while the reference is there, which keeps no data.
        self._storage = StorageWeakRef(tensor.untyped_storage()) if _is_plain(tensor) else None

    def has_changed(self) -> bool:
        tensor = self._tensor
        if (tensor.dtype, tensor.device) != self._kind:
            return False  # the whole model was cast or moved, as for an evaluation in half precision
        if tensor._version != self._version:
            return True
        if self._storage is not None and StorageWeakRef(tensor.untyped_storage()) != self._storage:
            return True
        now = None if self._values is None else _values(tensor)
        if now is None or self._values is None:
            return False
        return not torch.equal(now.view(torch.uint8), self._values.view(torch.uint8))  # bytes: NaN is NaN


def _values(tensor: torch.Tensor) -> torch.Tensor | None:
    """A copy of some of its values, on its device."""
    if not _is_plain(tensor) or not tensor.is_contiguous() or tensor.numel() == 0:
        return None
    return tensor.detach().view(-1)[:: max(1, tensor.numel() // _VALUES)].clone()


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it has memory of its own, that looks as it should."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta


def _is_quantized(parameter: nn.Parameter) -> bool:
    """Those of bitsandbytes are laid out anew as they are first used, and trained by nobody."""
    return type(parameter).__module__.startswith("bitsandbytes")
