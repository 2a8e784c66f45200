"""The ledger: counts the bytes of live tensor storages, and on a CPU enforces a budget on them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Counts live storages, made while it is entered or told to it by `hold`, on one type of device.

    A storage is counted once, however many tensors view it, until Python or autograd lets go of the last.
    Scratch that a kernel takes and gives back inside one operation is seen by no ledger.

    Attributes:
        live_bytes: what is alive now.
        peak_bytes: the most that was alive at once since the start or `reset_peak`.
        limit_bytes: crossing it raises; None only counts.

    Raises:
        torch.OutOfMemoryError: from the very operation whose result crosses `limit_bytes`, like an allocator's.
    """

    def __init__(self, limit_bytes: int | None = None, device_type: str = "cpu") -> None:
        super().__init__()
        self.limit_bytes = limit_bytes
        self.device_type = device_type
        self.live_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled, and torch's guard against it would cost more than many an operation does."""
        return False

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts tensors that were made elsewhere (parameters, buffers)."""
        for tensor in tensors:
            self._count(tensor)

    def reset_peak(self) -> None:
        """Starts a new peak from what is alive now."""
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.lift_fresh.default and out.dim() == 0:
            # A Python number made a tensor: an optimizer's step counter, a constant. On a GPU these stay on the host.
            self._ignore(out)
        elif isinstance(out, torch.Tensor):
            self._count(out)
        elif isinstance(out, (tuple, list)):
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self._count(leaf)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes()
        if self.limit_bytes is not None and self.live_bytes + size > self.limit_bytes:
            raise torch.OutOfMemoryError(
                f"CPU budget out of memory. Tried to allocate {size} bytes with {self.live_bytes} bytes live "
                f"of a budget of {self.limit_bytes} bytes."
            )
        self._sizes[key] = size
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._drop, key)

    def _ignore(self, tensor: torch.Tensor) -> None:
        """Never counts this tensor's storage."""
        storage = tensor.untyped_storage()
        if self._sizes.setdefault(storage._cdata, 0) == 0:
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key, 0)
