"""transformers' Trainer around the one step: its loop, schedule, checkpoints and callbacks; our micro-batches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from autofit.errors import AutofitError, OutOfBudget
from autofit.space.candidate import Candidate
from autofit.step.batch import Example, micro_batches, trained_tokens
from autofit.step.step import Step
from autofit.training.recovery.faults import QUIET_STEPS, Record, Strain, Watch, free_memory, held_bytes, retried
from autofit.training.recovery.optimizing import all_or_nothing
from autofit.training.recovery.recomputing import keeps_some, recomputing
from autofit.training.recovery.saving import WholeCheckpoints
from autofit.training.recovery.stopping import StopsOnSignals
from autofit.training.recovery.undo import Snapshot


@dataclass(frozen=True)
class GlobalBatch:
    """The sequences of one optimizer step. No tensor: nothing moves to the device before the cut."""

    examples: Sequence[Example]


def collate_global_batch(examples: Sequence[Example]) -> dict[str, GlobalBatch]:
    """What the Trainer's loader yields: one global batch, uncut."""
    return {"batch": GlobalBatch(examples)}


class NonFiniteLoss(AutofitError):
    """The loss is no number any more; the last checkpoint is from before that."""


class StepTrainer(StopsOnSignals, WholeCheckpoints, Trainer):
    """Runs `Step` once for each micro-batch of a global batch; the Trainer sees one batch a step, never the cut.

    The model is the step's, as built: mixed precision and checkpointing are the builder's and the step's affair.

    Attributes:
        recovery: where it ran out of memory, and what was done; also in the output folder's `events.jsonl`.
    """

    def __init__(self, step: Step, candidate: Candidate, pad_token_id: int, args: TrainingArguments, **kwargs: Any):
        self.step = step
        self.candidate = candidate
        self.pad_token_id = pad_token_id
        self._token_budget = self._eval_budget = candidate.token_budget
        self._quiet = 0
        self._strain = Strain()
        self._tokens = {"tokens": 0, "padded_tokens": 0}
        self.recovery = Record(args.output_dir)
        super().__init__(model=step.model, args=args, data_collator=collate_global_batch, **kwargs)
        if self.optimizer is not None:
            all_or_nothing(self.optimizer, self.recovery)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The gradients of one global batch; returns its mean loss per trained token, on the device.

        Where it runs out of memory it is undone and done again: the same, then in smaller micro-batches, then with all
        activations recomputed.

        Raises:
            OutOfBudget: its longest sequence does not fit alone, not even so.
        """
        model.train()
        examples = inputs["batch"].examples
        longest = max(len(example["input_ids"]) for example in examples)
        before = retried(self.recovery, "snapshot", lambda: Snapshot(self, model))
        same_again, recompute = True, False
        while True:
            with (
                Watch(lambda: held_bytes(model, self.optimizer)) as watch,
                recomputing(model) if recompute else contextlib.nullcontext(),
            ):
                batches = list(micro_batches(examples, self._token_budget, self.pad_token_id, self.candidate.layout))
                loss = self.step.accumulate(batches, trained_tokens(examples))
            if watch.fault is None:
                break
            model.zero_grad()
            free_memory()
            before.restore()
            if same_again:
                same_again, did = False, "freed memory and tried the same again"
            elif self._token_budget > longest:
                self._token_budget = max(longest, self._token_budget // 2)
                did = f"cut into micro-batches of at most {self._token_budget} tokens"
            elif not recompute and keeps_some(model):
                recompute, did = True, "recomputes all activations in this step"
            else:
                raise OutOfBudget(
                    f"step {self.state.global_step + 1} does not fit: a sequence of {longest} tokens alone, with all "
                    f"activations recomputed, is too much; {watch.fault}"
                )
            self.recovery.oom(watch, "step", did, step=self.state.global_step)
        self._tokens["tokens"] += sum(len(example["input_ids"]) for example in examples)
        self._tokens["padded_tokens"] += sum(batch.padded_tokens for batch in batches)
        self._grow_back(quiet=same_again)
        if self._strain.after_step() and self._token_budget > longest:
            self._token_budget = max(longest, self._token_budget // 2)
            self.recovery.add("strain", step=self.state.global_step, tokens=self._token_budget)
        self.step.before_optimizer(self.optimizer.optimizer)  # type: ignore[union-attr]  # accelerate wraps it
        return loss

    def _grow_back(self, quiet: bool) -> None:
        """After enough steps without a fault micro-batches get larger again."""
        self._quiet = self._quiet + 1 if quiet else 0
        if self._token_budget < self.candidate.token_budget and self._quiet >= QUIET_STEPS:
            self._quiet = 0
            self._token_budget = min(2 * self._token_budget, self.candidate.token_budget)
            self.recovery.add("grow", step=self.state.global_step, tokens=self._token_budget)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The mean loss per trained token of one evaluation batch, cut as in training; finer where that does not fit.

        Raises:
            OutOfBudget: a single sequence does not fit.
        """
        examples = inputs["batch"].examples
        longest = max(len(example["input_ids"]) for example in examples)
        while True:
            with Watch() as watch:
                batches = micro_batches(examples, self._eval_budget, self.pad_token_id, self.candidate.layout)
                loss = torch.stack([self.step.evaluate(batch) for batch in batches]).sum()
                return loss / max(1, trained_tokens(examples)), None, None
            free_memory()
            self.recovery.oom(watch, "eval", "cut finer")
            if self._eval_budget <= longest:
                raise OutOfBudget(f"evaluation does not fit, with one sequence of {longest} tokens: {watch.fault}")
            self._eval_budget = max(longest, self._eval_budget // 2)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as the Trainer does; of a step also its tokens, without and with padding.

        Raises:
            NonFiniteLoss: the loss or the gradients' norm is NaN or infinite. Every step is logged before anything is
                saved, so the last checkpoint is from before.
        """
        for name, what in (("loss", "loss"), ("grad_norm", "gradients' norm")):
            value = logs.get(name)
            if value is not None and not math.isfinite(value):
                raise NonFiniteLoss(f"the {what} became {value} at step {self.state.global_step}")
        if "grad_norm" in logs:
            logs = {**logs, **self._tokens}
            self._tokens = dict.fromkeys(self._tokens, 0)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Not counted: the stock count needs tensors that this loader does not yield."""
        return 0
