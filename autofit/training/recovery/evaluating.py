"""Evaluation that shrinks on its own where it runs out of memory, and never touches training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autofit.errors import OutOfBudget
from autofit.training.recovery.cutting import MOST_ROWS, LossKind, is_cuttable, measure_kind, weight_of
from autofit.training.recovery.faults import AGAIN, Record, free_memory, retried
from autofit.training.recovery.figures import agree_with_figures, local_figures
from autofit.training.recovery.ranks import Ranks
from autofit.training.recovery.rows import can_be_cut, count_rows, take_whole
from autofit.training.recovery.undo import Snapshot

_PASSES = 3


class RecoveringEvaluation:
    """Mixed into a trainer class, before it."""

    recovery: Record
    _ranks: Ranks | None = None
    _eval_rows: int | None = None
    _eval_kind: LossKind | None = None
    _eval_checked: int | None = None

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """The stock step; after an out-of-memory once more, then in as few rows at a time as it takes, put together.

        Raises:
            OutOfBudget: a single row does not fit; or does not on another rank.
        """
        if self._ranks is None:
            return self._shrinking_step(model, inputs, prediction_loss_only, ignore_keys)
        trainer: Any = self
        items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
        trainer._get_num_items_in_batch = lambda *asked: items  # of the whole batch, whatever part is asked for
        try:
            with local_figures(self):
                answer = self._shrinking_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            del trainer._get_num_items_in_batch
        agree_with_figures(self, "evaluation", 1)
        return answer

    def _shrinking_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None
    ) -> Any:
        rows = count_rows(inputs)
        stock, asked = super().prediction_step, (prediction_loss_only, ignore_keys)  # type: ignore[misc]
        before, again = Snapshot(self, model), False
        while True:
            most = min(rows, self._eval_rows or rows)
            with self.recovery.watch() as watch:
                if most >= rows or not can_be_cut(inputs):
                    return stock(model, inputs, *asked)
                parts = [take_whole(inputs, start, min(start + most, rows)) for start in range(0, rows, most)]
                answers = [stock(model, part, *asked) for part in parts]
                if self._eval_checked != most:
                    now = Snapshot(self, model)
                    one = answers[0] if most == 1 else stock(model, take_whole(inputs, 0, 1), *asked)
                    now.restore()  # that one is not counted twice
                    _check_of_rows(answers[0], one, most)
                    self._eval_checked = most
                loss = None if answers[0][0] is None else self._eval_loss(model, inputs, parts, [a[0] for a in answers])
                return loss, *(_concatenated([answer[i] for answer in answers]) for i in (1, 2))
            free_memory()
            before.restore()
            again = not again
            self.recovery.oom(watch, "eval", AGAIN if again else f"fewer than {most} rows at a time")
            if again:
                continue
            if most <= 1 or not can_be_cut(inputs):
                raise OutOfBudget(f"evaluation does not fit, with {most} rows at a time: {watch.fault}")
            self._eval_rows = most // 2

    def _eval_loss(self, model: nn.Module, inputs: Any, parts: list[Any], losses: list[torch.Tensor]) -> torch.Tensor:
        """The loss of a batch from those of its parts; what kind of loss it is was measured."""
        if self._eval_kind is None:
            before, stock = Snapshot(self, model), super().prediction_step  # type: ignore[misc]
            tolerance, most_rows = self._tolerance(model), min(MOST_ROWS, max(2, self._eval_rows or 2))  # so many fit
            self._eval_kind = measure_kind(
                inputs, lambda rows: float(stock(model, rows, True)[0]), self._shifted, tolerance, most_rows
            )
            before.restore()
        if not is_cuttable(inputs, self._eval_kind):
            raise OutOfBudget("evaluation does not fit and cannot be cut: its loss takes all rows of a batch together")
        weights = [weight_of(part, inputs, self._eval_kind, self._shifted) for part in parts]
        weighted = [(weight, loss) for weight, loss in zip(weights, losses, strict=True)]
        # The mean of nothing is no number, whatever it is multiplied by.
        counted = [one for one in weighted if one[0]] or weighted
        return torch.stack([weight * loss for weight, loss in counted]).sum()

    @property
    def _shifted(self) -> bool:
        """Whether the first label of a row is predicted by nothing."""
        return bool(getattr(self, "_loss_shifts_labels", True))

    def _tolerance(self, model: nn.Module) -> float:
        """What rounding may do to a loss, relative."""
        trainer: Any = self
        exact = not (trainer.args.bf16 or trainer.args.fp16)
        exact = exact and all(p.dtype is torch.float32 for p in model.parameters() if p.is_floating_point())
        return 1e-5 if exact else 3e-3

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The stock loop; where what piles up between its steps does not fit, again, with results moved to the host.

        Each evaluation begins with whole batches. Of several ranks none does it again, for the loop gathers from all.

        Raises:
            OutOfBudget: it does not fit even so.
        """
        trainer: Any = self
        stock = super().evaluation_loop  # type: ignore[misc]
        self._eval_rows = self._eval_checked = None
        if self._ranks is not None:
            with self._ranks.together("evaluation"):
                return retried(self.recovery, "evaluation", lambda: stock(*args, **kwargs), times=1)
        before, steps = Snapshot(self, trainer.model), trainer.args.eval_accumulation_steps
        try:
            for _ in range(_PASSES):
                with self.recovery.watch() as watch:
                    return stock(*args, **kwargs)
                free_memory()
                before.restore()
                trainer.args.eval_accumulation_steps = 1
                self.recovery.oom(watch, "eval", "again, results to the host each step")
        finally:
            trainer.args.eval_accumulation_steps = steps
        raise OutOfBudget(f"evaluation does not fit, tried {_PASSES} times: {watch.fault}")


def _check_of_rows(answer: Any, of_one: Any, rows: int) -> None:
    """Looks at what some rows and one row alone came to: whether each value belongs to a row.

    Of one row alone a table of all rows with all looks like a single value of each; a loss would tell.

    Raises:
        OutOfBudget: some does not, or may not.
    """
    shapes, ones = _shapes(answer[1:]), _shapes(of_one[1:])
    # A model that squeezes drops the dimension of rows where there is one.
    good = [len(s) == len(o) > 0 and s == (rows * o[0], *o[1:]) for s, o in zip(shapes, ones, strict=False)]
    unclear = rows == 1 and answer[0] is None and any(shape == (1, 1) for shape in shapes)
    if len(shapes) != len(ones) or not all(good) or unclear:
        raise OutOfBudget("evaluation does not fit and cannot be cut: not all of its results are those of single rows")


def _shapes(value: Any) -> list[tuple[int, ...]]:
    if torch.is_tensor(value):
        return [tuple(value.shape)]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [shape for one in inner for shape in _shapes(one)]


def _concatenated(values: list[Any]) -> Any:
    first = values[0]
    if first is None:
        return None
    if torch.is_tensor(first):
        return torch.cat(values)
    if isinstance(first, dict):
        return type(first)({name: _concatenated([value[name] for value in values]) for name in first})
    return type(first)(_concatenated([value[i] for value in values]) for i in range(len(first)))
