"""Evaluation that shrinks on its own where it runs out of memory, and never touches training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autofit.errors import OutOfBudget
from autofit.training.recovery.faults import Record, Watch, free_memory
from autofit.training.recovery.rows import can_be_cut, count_rows, take, trained_items
from autofit.training.recovery.undo import Snapshot

_PASSES = 3


class RecoveringEvaluation:
    """Mixed into a trainer class, before it."""

    recovery: Record
    _eval_rows: int | None = None

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """The stock step; after an out-of-memory in as few rows at a time as it takes, put together again.

        Raises:
            OutOfBudget: a single row does not fit.
        """
        rows = count_rows(inputs)
        stock = super().prediction_step  # type: ignore[misc]
        before = Snapshot(self, model)
        while True:
            most = min(rows, self._eval_rows or rows)
            with Watch() as watch:
                if most >= rows or not can_be_cut(inputs):
                    return stock(model, inputs, prediction_loss_only, ignore_keys)
                parts = [take_rows(inputs, start, min(start + most, rows)) for start in range(0, rows, most)]
                answers = [stock(model, part, prediction_loss_only, ignore_keys) for part in parts]
                return _joined(answers, parts)
            free_memory()
            before.restore()
            self.recovery.add("oom", phase="eval", message=watch.fault, did=f"fewer than {most} rows at a time")
            if most <= 1 or not can_be_cut(inputs):
                raise OutOfBudget(f"evaluation does not fit, with {most} rows at a time: {watch.fault}")
            self._eval_rows = most // 2

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The stock loop; where what piles up between its steps does not fit, again, with results moved to the host.

        Raises:
            OutOfBudget: it does not fit even so.
        """
        trainer: Any = self
        stock = super().evaluation_loop  # type: ignore[misc]
        before, steps = Snapshot(self, trainer.model), trainer.args.eval_accumulation_steps
        try:
            for _ in range(_PASSES):
                with Watch() as watch:
                    return stock(*args, **kwargs)
                free_memory()
                before.restore()
                trainer.args.eval_accumulation_steps = 1
                self.recovery.add("oom", phase="eval", message=watch.fault, did="again, results to the host each step")
        finally:
            trainer.args.eval_accumulation_steps = steps
        raise OutOfBudget(f"evaluation does not fit, tried {_PASSES} times: {watch.fault}")


def take_rows(batch: Any, start: int, end: int) -> Any:
    """Rows start…end−1 as they are, padding included: predictions of all parts must have one shape."""
    rows = list(range(start, end))
    part = take(batch, rows)
    whole = {
        name: value[start:end] if torch.is_tensor(value) and value.dim() else part[name]
        for name, value in batch.items()
    }
    return type(batch)(whole)


def _joined(answers: list[Any], parts: list[Any]) -> Any:
    """(loss, logits, labels) of all parts; the loss as a mean weighted by trained tokens."""
    items = [trained_items(part, shifted=True) for part in parts]
    counts = [count if count is not None else count_rows(part) for count, part in zip(items, parts, strict=True)]
    losses = [answer[0] for answer in answers]
    loss = None
    if losses[0] is not None:
        loss = sum(one * (count / max(1, sum(counts))) for one, count in zip(losses, counts, strict=True))
    return loss, _concatenated([a[1] for a in answers]), _concatenated([a[2] for a in answers])


def _concatenated(values: list[Any]) -> Any:
    first = values[0]
    if first is None:
        return None
    if torch.is_tensor(first):
        return torch.cat(values)
    if isinstance(first, dict):
        return type(first)({name: _concatenated([value[name] for value in values]) for name in first})
    return type(first)(_concatenated([value[i] for value in values]) for i in range(len(first)))
