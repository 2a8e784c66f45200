"""Offloading where tensors have no values: what TRL and transformers keep on the device, and for how long.

Nothing is copied: a tensor that went to the host is forgotten but for its shape, and made anew when backward asks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

# The defaults of TRL's get_act_offloading_ctx_manager.
MIN_BYTES = 1024
STASHED = 5


class HostSaved(saved_tensors_hooks):
    """torch's `save_on_cpu`: what is saved leaves the device at once and comes back when it is unpacked.

    Both copies run on the compute stream, so the device's memory is free as soon as nobody else holds the tensor.
    """

    def __init__(self) -> None:
        def pack(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
            size, dtype, device = tensor.size(), tensor.dtype, tensor.device
            return lambda: torch.empty(size, dtype=dtype, device=device)

        super().__init__(pack, lambda make: make())


def host_saved_checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """transformers' checkpointing with `offload=True`: the positional tensors of each layer go to the host."""
    with HostSaved():
        return checkpoint(function, *args, use_reentrant=False)


def save_checkpoints_on_host(base: nn.Module) -> None:
    """In place of the checkpointing function that transformers gave the model, which would copy."""
    module: Any
    for module in base.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = host_saved_checkpoint


@dataclass(frozen=True)
class _Away:
    """A tensor on the host: how it lay in its storage of `elements` elements."""

    elements: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor, broadcast: bool) -> _Away:
        stored = tensor.untyped_storage().nbytes() // tensor.element_size()
        elements = stored if broadcast else tensor.numel()
        offset = int(tensor.storage_offset())
        return cls(elements, tensor.size(), tensor.stride(), offset, tensor.dtype, tensor.device)

    def back(self) -> torch.Tensor:
        whole = torch.empty(self.elements, dtype=self.dtype, device=self.device)
        return torch.as_strided(whole, self.size, self.stride, self.offset)


class StashedActivations(saved_tensors_hooks):
    """TRL's `OffloadActivations` with its streams: forward and backward of one micro-batch run inside.

    On the device stay: tensors below `MIN_BYTES`, the model's parameters, and tensors whose storage is among the
    stashed ones already. Any other is stashed (as a contiguous copy if it is a strided view) until a later one leaves
    the device with a number at least `STASHED` higher; every saved tensor has a number. In backward a tensor that came
    back lives until the node after the next to ask for one is done; one whose storage somebody else came to hold by
    the end of its own node lives as long as that holder.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = {_storage(parameter) for parameter in model.parameters()}
        self._node: Any = None  # TRL's outlives the micro-batch, and with it what that node reaches
        self._clear()
        super().__init__(self._pack, self._unpack)

    def __enter__(self) -> None:
        self._clear()
        super().__enter__()

    def __exit__(self, *args: object) -> None:
        self._stash.clear()
        self._back.clear()
        super().__exit__(*args)

    def _clear(self) -> None:
        self._number = 0
        self._saved: dict[int, torch.Tensor | _Away] = {}
        self._stash: dict[int, torch.Tensor] = {}
        self._numbers: dict[tuple[int, int, torch.dtype], int] = {}
        self._keys: dict[int, tuple[int, int, torch.dtype]] = {}
        self._back: dict[int, torch.Tensor] = {}
        self._in_backward = False

    def _pack(self, tensor: torch.Tensor) -> int:
        self._number += 1
        number = self._number
        key = (_storage(tensor), int(tensor.storage_offset()), tensor.dtype)
        if key in self._numbers:
            self._track(key, number)
            self._saved[number] = tensor
        elif tensor.nbytes < MIN_BYTES or key[0] in self._weights:
            self._saved[number] = tensor
        else:
            self._send(tensor, key, number)
        return number

    def _send(self, tensor: torch.Tensor, key: tuple[int, int, torch.dtype], number: int) -> None:
        broadcast = 0 in tensor.stride()
        if not broadcast and (not tensor.is_contiguous() or tensor.storage_offset() != 0):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        for old in [n for n in self._stash if n <= number - STASHED]:
            del self._stash[old]
            self._release(old)
        self._saved[number] = _Away.of(tensor, broadcast)
        self._stash[number] = tensor
        self._track(key, number)

    def _unpack(self, number: int) -> torch.Tensor:
        if not self._in_backward:
            self._in_backward = True
            # The engine's own end of backward: what came back last has no later node.
            torch.autograd.Variable._execution_engine.queue_callback(self._back.clear)
        saved = self._saved.pop(number)
        if isinstance(saved, _Away):
            saved = self._bring(saved, number)
        self._release(number)
        return saved

    def _bring(self, away: _Away, number: int) -> torch.Tensor:
        node = torch._C._current_autograd_node()
        before = [] if node == self._node else list(self._back)
        self._node = node
        holders = 0
        stashed = self._stash.get(number)
        tensor = away.back() if stashed is None else stashed
        if stashed is None:
            self._back[number] = tensor
            holders = _holders(tensor)

        def node_is_done(*_: object) -> None:
            if number in self._back and _holders(self._back[number]) > holders:
                del self._back[number]
            for old in list(self._stash):
                del self._stash[old]
                self._release(old)
            for old in before:
                self._back.pop(old, None)

        node.register_hook(node_is_done)
        return tensor

    def _track(self, key: tuple[int, int, torch.dtype], number: int) -> None:
        self._numbers[key] = number
        self._keys[number] = key

    def _release(self, number: int) -> None:
        key = self._keys.pop(number, None)
        if key is not None and self._numbers.get(key) == number:
            del self._numbers[key]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _holders(tensor: torch.Tensor) -> int:
    return torch._C._storage_Use_Count(_storage(tensor))
