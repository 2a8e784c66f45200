"""transformers' Trainer around the one step: its loop, schedule, checkpoints and callbacks; our micro-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from autofit.errors import AutofitError, OutOfBudget
from autofit.space.candidate import Candidate
from autofit.step.batch import Example, MicroBatch, micro_batches, trained_tokens
from autofit.step.step import Step
from autofit.training.recovery.clipping import ClipsWhole
from autofit.training.recovery.faults import AGAIN, Record, free_memory, held_bytes
from autofit.training.recovery.optimizing import all_or_nothing
from autofit.training.recovery.redoing import RedoesSteps
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


class StepTrainer(RedoesSteps, ClipsWhole, StopsOnSignals, WholeCheckpoints, Trainer):
    """Runs `Step` once for each micro-batch of a global batch; the Trainer sees one batch a step, never the cut.

    The model is the step's, as built: mixed precision and checkpointing are the builder's and the step's affair.

    Attributes:
        recovery: where it ran out of memory, and what was done; also in the output folder's `events.jsonl`.
    """

    def __init__(self, step: Step, candidate: Candidate, pad_token_id: int, args: TrainingArguments, **kwargs: Any):
        self.step = step
        self.candidate = candidate
        self.pad_token_id = pad_token_id
        self._eval_budget = candidate.token_budget
        self._tokens = {"tokens": 0, "padded_tokens": 0}
        self.recovery = Record(args.output_dir)
        super().__init__(model=step.model, args=args, data_collator=collate_global_batch, **kwargs)
        self.recovery.holder = lambda: held_bytes(step.model, self.optimizer)
        if self.optimizer is not None:
            all_or_nothing(self.optimizer, self.recovery, self._has_moved)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The gradients of one global batch; returns its mean loss per trained token, on the device.

        Where it runs out of memory it is undone and done again, see `RedoesSteps`.

        Raises:
            OutOfBudget: a sequence does not fit alone, whatever is recomputed and kept on the host.
        """
        model.train()
        examples = inputs["batch"].examples
        batches, losses = self._gradients(model, _Cut(self, examples))
        self._tokens["tokens"] += sum(len(example["input_ids"]) for example in examples)
        self._tokens["padded_tokens"] += sum(batch.tokens for batch in batches)
        self.step.before_optimizer(self.optimizer.optimizer)  # type: ignore[union-attr]  # accelerate wraps it
        return torch.stack(losses).sum()

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The mean loss per trained token of one evaluation batch, cut as in training.

        After an out-of-memory once more, then cut finer until the evaluation's end.

        Raises:
            OutOfBudget: a single sequence does not fit.
        """
        examples = inputs["batch"].examples
        longest, again = max(len(example["input_ids"]) for example in examples), False
        while True:
            with self.recovery.watch() as watch:
                batches = micro_batches(examples, self._eval_budget, self.pad_token_id, self.candidate.layout)
                losses = []
                for batch in batches:
                    self._heed()
                    losses.append(self.step.evaluate(batch))
                loss = torch.stack(losses).sum()
                return loss / max(1, trained_tokens(examples)), None, None
            free_memory()
            again = not again
            self.recovery.oom(watch, "eval", AGAIN if again else "cut finer")
            if again:
                continue
            if self._eval_budget <= longest:
                raise OutOfBudget(f"evaluation does not fit, with one sequence of {longest} tokens: {watch.fault}")
            self._eval_budget = max(longest, self._eval_budget // 2)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The stock loop, which begins with batches cut as in training."""
        self._eval_budget = self.candidate.token_budget
        return super().evaluation_loop(*args, **kwargs)

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


class _Cut:
    """A global batch as `redoing.Work`."""

    def __init__(self, trainer: StepTrainer, examples: Sequence[Example]) -> None:
        self._trainer, self._examples = trainer, examples
        self._normalizer = trained_tokens(examples)

    def pieces(self, most_tokens: int | None) -> list[MicroBatch]:
        candidate = self._trainer.candidate
        budget = most_tokens or candidate.token_budget
        return list(micro_batches(self._examples, budget, self._trainer.pad_token_id, candidate.layout))

    def run(self, piece: MicroBatch) -> torch.Tensor:
        return self._trainer.step.micro_batch(piece, self._normalizer)

    def finer(self, failed: MicroBatch, before: Snapshot) -> int | None:
        return failed.tokens // 2 if failed.sequences > 1 else None

    def why(self, failed: MicroBatch) -> str:
        return f"a sequence of {failed.tokens} tokens alone is too much, with all activations recomputed"
