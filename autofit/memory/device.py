"""The device this process would use, known without making a CUDA context on it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from autofit.space.facts import DeviceFacts


def detect_device() -> DeviceFacts:
    """The first visible NVIDIA GPU if torch can use one, else the CPU with the memory this process may use."""
    # Ask NVML: torch's own question would make a context, and a forked child could then use no GPU at all.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if torch.cuda.is_available():
        with nvml_device() as (pynvml, handle):
            name = pynvml.nvmlDeviceGetName(handle)
            return DeviceFacts(
                type="cuda",
                name=name.decode() if isinstance(name, bytes) else name,
                total_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                compute_capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
            )
    return cpu_facts()


def cpu_facts() -> DeviceFacts:
    """The CPU, with the memory that this process may use."""
    return DeviceFacts(type="cpu", name=f"CPU ({platform.machine()})", total_bytes=host_memory_bytes())


def host_memory_bytes() -> int:
    """Host memory this process may use: the machine's, or less where a cgroup says so."""
    limits = [psutil.virtual_memory().total]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                text = file.read().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


@contextmanager
def nvml_device() -> Iterator[tuple[Any, Any]]:
    """NVML, started, and its handle of the first visible GPU (torch's device 0)."""
    import pynvml

    pynvml.nvmlInit()
    try:
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
        by_index = first.isdigit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(first)) if by_index else pynvml.nvmlDeviceGetHandleByUUID(first)
        yield pynvml, handle
    finally:
        pynvml.nvmlShutdown()
