"""A trainer's process held to a part of its device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from autofit.errors import UsageError
from autofit.memory.calibration import UNCALIBRATED, load_calibration
from autofit.memory.device import cpu_facts, detect_device
from autofit.memory.meter import open_meter
from autofit.space.budget import make_budget
from autofit.space.units import format_bytes


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; what is shared counts once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class Cap:
    """What `gpu_mem` leaves to this process, of the device that a trainer uses.

    Attributes:
        device: the facts of the device.
        usable_bytes: the budget less headroom, CUDA context included.

    Raises:
        UsageError: no size; or more is asked for by the weights alone, then with the line to change.
    """

    def __init__(self, gpu_mem: str, model: nn.Module, device: torch.device) -> None:
        self.device = detect_device() if device.type == "cuda" else cpu_facts()
        self.usable_bytes = make_budget(gpu_mem, self.device).usable_bytes
        self._context_bytes = 0
        if self.device.type == "cuda":
            self._context_bytes = (load_calibration(self.device) or UNCALIBRATED).context_bytes
        held = weight_bytes(model)
        if held + self._context_bytes > self.usable_bytes:
            smaller = "load it with quantization_config=BitsAndBytesConfig(load_in_4bit=True), or "
            smaller = "" if getattr(model, "is_loaded_in_4bit", False) else smaller
            raise UsageError(
                f"gpu_mem={gpu_mem!r}: the model's weights alone take {format_bytes(held)} of it; {smaller}give more"
            )

    @contextlib.contextmanager
    def held(self, model: nn.Module) -> Iterator[None]:
        """While it is open, what goes beyond runs out of memory; the model is there already."""
        if self.device.type == "cpu":
            with open_meter("cpu", self.usable_bytes) as meter:
                meter.hold([*model.parameters(), *model.buffers()])
                del model  # `model_init` makes another
                yield
            return
        del model
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (self.usable_bytes - self._context_bytes) / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
