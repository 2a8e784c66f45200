"""Measures and caps what a process takes of its device: by the ledger on a CPU, by the allocator and driver on CUDA."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

import torch

from autofit.memory.device import nvml_device
from autofit.memory.host_allocator import keep_freed_memory
from autofit.memory.ledger import Ledger


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Peaks since the last `reset_peak`, in bytes. On a CPU all three are one."""

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int


class CpuMeter(contextlib.AbstractContextManager["CpuMeter"]):
    """Counts live tensor storages while entered; crossing the cap raises `torch.OutOfMemoryError`."""

    def __init__(self, cap_bytes: int | None) -> None:
        self._ledger = Ledger(limit_bytes=cap_bytes)

    def __enter__(self) -> CpuMeter:
        keep_freed_memory()
        self._ledger.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ledger.__exit__(kind, value, trace)

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts tensors that came to be without an operation (weights read from a file)."""
        self._ledger.hold(tensors)

    def live_bytes(self) -> int:
        return self._ledger.live_bytes

    def reset_peak(self) -> None:
        self._ledger.reset_peak()

    def peaks(self) -> Peaks:
        peak = self._ledger.peak_bytes
        return Peaks(allocated_bytes=peak, reserved_bytes=peak, device_bytes=peak)

    def settle(self) -> None:
        """A CPU's memory is given back as it is freed."""

    def measure_context(self) -> None:
        """There is none on a CPU."""

    def synchronize(self) -> None:
        """A CPU's operations are done when they return."""


class CudaMeter(contextlib.AbstractContextManager["CudaMeter"]):
    """Caps PyTorch's allocator to the cap less the CUDA context; `device_bytes` are reserved bytes plus context.

    Memory that bitsandbytes pages (managed memory) is in neither: the driver evicts it where room is short.
    """

    def __init__(self, cap_bytes: int | None) -> None:
        self._cap_bytes = cap_bytes
        self._others_bytes = 0
        self.context_bytes = 0

    def __enter__(self) -> CudaMeter:
        self._others_bytes = _used_on_card()
        torch.cuda.init()
        torch.empty(1, device="cuda")
        self.measure_context()
        if self._cap_bytes is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            room = self._cap_bytes - self.context_bytes
            if room <= 0:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. The CUDA context alone takes {self.context_bytes} bytes "
                    f"of {self._cap_bytes} bytes."
                )
            torch.cuda.set_per_process_memory_fraction(min(1.0, room / total))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """The allocator has counted them."""

    def live_bytes(self) -> int:
        return torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> Peaks:
        reserved = torch.cuda.max_memory_reserved()
        return Peaks(
            allocated_bytes=torch.cuda.max_memory_allocated(),
            reserved_bytes=reserved,
            device_bytes=reserved + self.context_bytes,
        )

    def settle(self) -> None:
        """Gives back what building the model left in the allocator: weights before they were quantized."""
        gc.collect()
        torch.cuda.empty_cache()

    def measure_context(self) -> None:
        """What the driver sees beyond the allocator now: the context and the kernels loaded so far."""
        # NVML before and after: what the driver keeps for itself is in both.
        beyond = _used_on_card() - self._others_bytes - torch.cuda.memory_reserved()
        self.context_bytes = max(self.context_bytes, beyond)

    def synchronize(self) -> None:
        torch.cuda.synchronize()


Meter = CpuMeter | CudaMeter


def open_meter(device_type: str, cap_bytes: int | None) -> Meter:
    """The meter of a device, not yet entered. `cap_bytes` includes the CUDA context; None only measures."""
    return CudaMeter(cap_bytes) if device_type == "cuda" else CpuMeter(cap_bytes)


def _used_on_card() -> int:
    """Bytes in use on the card by anyone, by NVML, which makes no context itself."""
    with nvml_device() as (pynvml, handle):
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
