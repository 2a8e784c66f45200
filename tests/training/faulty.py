"""Preloaded into a test's fork server: the training children of that server misbehave as `faults.json` says.

It lies beside the run's folder: a list of {"how", "step", "times"}, counted down as they strike, across processes.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch

from autofit.errors import OutOfBudget, UsageError
from autofit.training.trainer import StepTrainer


def strike(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "exit":
        os._exit(1)
    elif how == "hang":
        while True:  # deaf to SIGTERM, as a kernel that does not end
            time.sleep(60)
    elif how == "slow":
        time.sleep(2)
    elif how == "poison" and torch.cuda.is_available():  # the context is no use any more from here on
        torch.zeros(1, device="cuda")[torch.tensor([5], device="cuda")].item()
    elif how == "poison":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    elif how == "budget":
        raise OutOfBudget("a step does not fit")
    elif how == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    elif how == "usage":
        raise UsageError("not like that")


def due(folder: Path, step: int) -> str | None:
    file = folder.parent / "faults.json"
    faults = json.loads(file.read_text()) if file.is_file() else []
    for fault in faults:
        if fault["step"] == step and fault["times"] > 0:
            fault["times"] -= 1
            file.write_text(json.dumps(faults))
            return fault["how"]
    return None


def fail_once(step):
    def micro_batch(*_):
        del step.micro_batch
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 KiB")

    step.micro_batch = micro_batch


genuine = StepTrainer.training_step


def training_step(self, *args, **kwargs):
    """The genuine one, once it has run: gradients are there, the optimizer's step is not."""
    how = due(Path(self.args.output_dir), self.state.global_step + 1)
    if how == "within":
        fail_once(self.step)
    loss = genuine(self, *args, **kwargs)
    if how is not None:
        strike(how)
    return loss


StepTrainer.training_step = training_step
