"""THE step: forward, loss, backward of one micro-batch. Trial and training both run this and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import masking_utils

from autofit.space.candidate import Candidate
from autofit.space.source import ModelSource
from autofit.step.batch import MicroBatch
from autofit.step.loss import LOSSES, Loss
from autofit.step.model import build_model, offload_context
from autofit.step.policy import StepPolicy


def _no_report(phase: str) -> None:
    del phase


@dataclass
class Step:
    """A built model with all that a micro-batch needs. Depends on no Trainer; reads no value from the device.

    Attributes:
        report: told the phase as it begins ("forward", "backward").
        scaler: scales the loss where the policy says so (float16), else switched off.
    """

    model: PeftModel
    policy: StepPolicy
    loss: Loss
    offload: contextlib.AbstractContextManager[Any]
    report: Callable[[str], None] = _no_report
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.policy.device, enabled=self.policy.loss_scaling)

    def micro_batch(self, batch: MicroBatch, normalizer: int) -> torch.Tensor:
        """Adds one micro-batch's gradients of (summed loss / `normalizer`); returns that loss, detached, on the device.

        `normalizer` is the trained tokens of the whole global batch, so that the cuts sum to the uncut loss.
        """
        batch = batch.to(self.policy.device)
        with self.offload:
            self.report("forward")
            with self._forward():
                loss = self.loss(self.model, batch) / max(normalizer, 1)
            self.report("backward")
            self.scaler.scale(loss).backward()
        return loss.detach()

    def evaluate(self, batch: MicroBatch) -> torch.Tensor:
        """The summed loss of one micro-batch, without gradients, on the device."""
        with torch.no_grad(), self._forward():
            return self.loss(self.model, batch.to(self.policy.device))

    def accumulate(self, batches: Iterable[MicroBatch], normalizer: int) -> torch.Tensor:
        """The gradients of a whole global batch; returns its mean loss per trained token, on the device."""
        losses = [self.micro_batch(batch, normalizer) for batch in batches]
        return torch.stack(losses).sum()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """After the last micro-batch: takes the loss scale out of the gradients.

        Where one is not finite all are dropped, so that `optimizer.step` changes nothing, and the scale falls.
        Does nothing (and waits for nothing) where the loss is not scaled.
        """
        if not self.policy.loss_scaling:
            return
        self.scaler.unscale_(optimizer)
        found = self.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        if any(flag.item() for flag in found.values()):
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        dtype = self.policy.autocast_dtype
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if dtype is not None:
            autocast = torch.autocast(self.policy.device, dtype=getattr(torch, dtype))
        with _rows_are_whole(), autocast:
            yield


@contextlib.contextmanager
def _rows_are_whole() -> Iterator[None]:
    """Tells transformers that no row holds two sequences; it would ask the device, and wait, at every forward."""
    stock = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = stock


def build_step(candidate: Candidate, source: ModelSource, policy: StepPolicy, lora_alpha: int, seed: int) -> Step:
    """The candidate's model and everything that its micro-batches need."""
    model = build_model(candidate, source, policy, lora_alpha, seed)
    return Step(model, policy, LOSSES[candidate.loss], offload_context(model, candidate))
