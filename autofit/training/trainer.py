"""transformers' Trainer around the one step: its loop, schedule, checkpoints and callbacks; our micro-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from autofit.errors import AutofitError
from autofit.space.candidate import Candidate
from autofit.step.batch import Example, micro_batches, trained_tokens
from autofit.step.step import Step


@dataclass(frozen=True)
class GlobalBatch:
    """The sequences of one optimizer step. No tensor: nothing moves to the device before the cut."""

    examples: Sequence[Example]


def collate_global_batch(examples: Sequence[Example]) -> dict[str, GlobalBatch]:
    """What the Trainer's loader yields: one global batch, uncut."""
    return {"batch": GlobalBatch(examples)}


class NonFiniteLoss(AutofitError):
    """The loss is no number any more; the last checkpoint is from before that."""


class StepTrainer(Trainer):
    """Runs `Step` once for each micro-batch of a global batch; the Trainer sees one batch a step, never the cut.

    The model is the step's, as built: mixed precision and checkpointing are the builder's and the step's affair.
    """

    def __init__(self, step: Step, candidate: Candidate, pad_token_id: int, args: TrainingArguments, **kwargs: Any):
        self.step = step
        self.candidate = candidate
        self.pad_token_id = pad_token_id
        super().__init__(model=step.model, args=args, data_collator=collate_global_batch, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The gradients of one global batch; returns its mean loss per trained token, on the device."""
        model.train()
        examples = inputs["batch"].examples
        batches = micro_batches(examples, self.candidate.token_budget, self.pad_token_id)
        loss = self.step.accumulate(batches, trained_tokens(examples))
        self.step.before_optimizer(self.optimizer.optimizer)  # type: ignore[union-attr]  # accelerate wraps it
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The mean loss per trained token of one evaluation batch, cut as in training."""
        examples = inputs["batch"].examples
        batches = micro_batches(examples, self.candidate.token_budget, self.pad_token_id)
        loss = torch.stack([self.step.evaluate(batch) for batch in batches]).sum()
        return loss / max(1, trained_tokens(examples)), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as the Trainer does.

        Raises:
            NonFiniteLoss: the loss or the gradients' norm is NaN or infinite. Every step is logged before anything is
                saved, so the last checkpoint is from before.
        """
        for name, what in (("loss", "loss"), ("grad_norm", "gradients' norm")):
            value = logs.get(name)
            if value is not None and not math.isfinite(value):
                raise NonFiniteLoss(f"the {what} became {value} at step {self.state.global_step}")
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Not counted: the stock count needs tensors that this loader does not yield."""
        return 0
