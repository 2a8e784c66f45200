"""Importing the heavy stack once, in a process that must stay fit to be forked: no CUDA, no tensor operation."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.abc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

HEAVY_STACK = (
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "trl.trainer.sft_trainer",
    "autofit.trial.child",
)

_CUDA_ERROR_NOT_INITIALIZED = 3


def preload(modules: Sequence[str], keep_going: Callable[[], bool] = lambda: True) -> list[str]:
    """Imports what can be imported; returns a line for each that could not. The child will meet the error itself.

    `keep_going` is asked between modules.
    """
    # torch then asks NVML whether there is a card; asking the runtime would start CUDA.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    failures = []
    with _capability_from_nvml():
        for module in modules:
            if not keep_going():
                break
            try:
                importlib.import_module(module)
            except BaseException as error:
                failures.append(f"{module}: {type(error).__name__}: {error}")
    gc.collect()
    return failures


def why_unfit_to_fork() -> str | None:
    """What makes a fork of this process useless: CUDA that has started. None where it is fit."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "torch initialised CUDA during the preload"
    if _driver_started():
        return "the CUDA driver was initialised during the preload"
    return None


def _driver_started() -> bool:
    """Whether cuInit was called in this process; without it there is no context."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    except OSError:  # not even loaded
        return False
    context = ctypes.c_void_p()
    return bool(driver.cuCtxGetCurrent(ctypes.byref(context)) != _CUDA_ERROR_NOT_INITIALIZED)


class _BeforeBitsandbytes(importlib.abc.MetaPathFinder):
    """Calls back just before bitsandbytes is imported, by whomever; finds nothing itself."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "bitsandbytes" and self._callback is not None:
            callback, self._callback = self._callback, None
            with contextlib.suppress(Exception):
                callback()


@contextlib.contextmanager
def _capability_from_nvml() -> Iterator[None]:
    """While it is open, the import of bitsandbytes learns the cards' compute capability without starting CUDA.

    bitsandbytes calls `torch.cuda.get_device_capability(torch.cuda.device(i))` to choose its library. Afterwards
    torch answers by itself again, also for those who kept a reference to the stand-in.
    """
    restore: list[Callable[[], None]] = []
    finder = _BeforeBitsandbytes(lambda: restore.append(_stand_in()))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for undo in restore:
            undo()


def _stand_in() -> Callable[[], None]:
    import torch

    genuine = (torch.cuda.get_device_capability, torch.cuda.get_device_properties)
    active = True

    def capability(device: Any = None) -> tuple[int, int]:
        known = _nvml_capability(torch, device) if active else None
        return known or genuine[0](device)

    def properties(device: Any = None) -> Any:
        known = _nvml_capability(torch, device) if active else None
        return SimpleNamespace(major=known[0], minor=known[1]) if known else genuine[1](device)

    def undo() -> None:
        nonlocal active
        active = False
        torch.cuda.get_device_capability, torch.cuda.get_device_properties = genuine

    torch.cuda.get_device_capability = capability
    torch.cuda.get_device_properties = properties
    return undo


def _nvml_capability(torch: Any, device: Any) -> tuple[int, int] | None:
    """By NVML, honouring CUDA_VISIBLE_DEVICES; None where NVML cannot say (torch then has to start CUDA)."""
    index = getattr(device, "idx", getattr(device, "index", device))
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda._get_nvml_device_index(index or 0))
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            return int(major), int(minor)
        finally:
            pynvml.nvmlShutdown()
    except Exception:
        return None
