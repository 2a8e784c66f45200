"""Recovery for transformers' Trainer and what is made of it: the gradient of the stock class, or `OutOfBudget`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers.utils import logging

from autofit.errors import UsageError
from autofit.training.recovery.budgeted import HeldToBudget
from autofit.training.recovery.clipping import ClipsWhole
from autofit.training.recovery.cutting import MOST_ROWS, LossKind, Piece, cut, finer
from autofit.training.recovery.evaluating import RecoveringEvaluation
from autofit.training.recovery.faults import Record, Watch, held_bytes, retried
from autofit.training.recovery.fetching import FetchesOnHost
from autofit.training.recovery.measuring import has_own_loss, measured_kind
from autofit.training.recovery.optimizing import all_or_nothing
from autofit.training.recovery.ranks import Ranks
from autofit.training.recovery.reducing import run_together, share_buffers
from autofit.training.recovery.refusals import check_arguments, check_trainer
from autofit.training.recovery.rows import can_be_cut, count_rows
from autofit.training.recovery.saving import WholeCheckpoints
from autofit.training.recovery.stopping import StopsOnSignals
from autofit.training.recovery.undo import Snapshot

logger = logging.get_logger(__name__)

_OWN_STEP = (
    "{} does not cover a training_step of your own that skips micro-batches, runs one twice or gives others on: with "
    "gradient_accumulation_steps they run together; take 1, do that in compute_loss, or take the stock class"
)
_UNCOVERED = (
    "{}: with gradient_accumulation_steps, a training_step of its own that gives on other inputs than it was given "
    "runs as in the stock class: a step that runs out of memory is not done again; do that in compute_loss"
)

# A script's own loss is measured with each of the first steps that are cut, then with every second, fourth, …
_EACH = 8


@dataclass
class _Window:
    """The micro-batches of one optimizer step; `seen` of them have been handed to `training_step`."""

    batches: list[Any]
    seen: int = 0
    model: Any = None
    items: Any = None

    @property
    def is_open(self) -> bool:
        """Whether some have been handed over, and wait for the others."""
        return 0 < self.seen < len(self.batches)


class RecoveringTrainer(
    HeldToBudget, RecoveringEvaluation, ClipsWhole, StopsOnSignals, WholeCheckpoints, FetchesOnHost
):
    """Mixed into a trainer class, before it.

    The stock loop hands over the micro-batches of an optimizer step one by one. All but the last are answered with
    nothing; with the last, all of them run: so they can be cut anew, and done again, as one.

    Args:
        gpu_mem: what the process may use of its device in `train`: a size ("24GB"), a card's name, or "auto". Where
            the model is one that can be estimated, the first step already runs in a way that fits.

    Attributes:
        recovery: what happened; also in `events.jsonl` of the output folder.
    """

    def __init__(self, *args: Any, gpu_mem: str | None = None, **kwargs: Any) -> None:
        check_arguments(type(self), kwargs)
        super().__init__(*args, **kwargs)
        trainer: Any = self
        check_trainer(trainer)
        self._ranks = Ranks(trainer) if trainer.args.world_size > 1 else None
        self.recovery = Record(trainer.args.output_dir, **({} if self._ranks is None else {"rank": self._ranks.rank}))
        self.recovery.holder = lambda: held_bytes(trainer.model, trainer.optimizer)
        self._hold_to(gpu_mem)
        self._window: _Window | None = None
        self._kind: LossKind | None = None
        self._cut_steps = 0
        if trainer.optimizer is not None:
            all_or_nothing(trainer.optimizer, self.recovery, self._has_moved)
        self._not_of_the_script = {*vars(self), *dir(RecoveringTrainer), "_not_of_the_script"}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as the stock class does; under `gpu_mem`, where that was given."""
        together = contextlib.nullcontext() if self._ranks is None else self._ranks.together("training")
        with together, self._within_budget():
            try:
                return super().train(*args, **kwargs)
            finally:
                for line in self.recovery.summary():
                    logger.warning(line)

    # The seams of the stock loop

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The stock optimizer, whose step is all or nothing."""
        optimizer = super().create_optimizer(*args, **kwargs)
        all_or_nothing(optimizer, self.recovery, self._has_moved)
        return optimizer

    def _wrap_model(self, *args: Any, **kwargs: Any) -> Any:
        """The stock model. There is an optimizer by now, and nobody has wrapped it yet: also one of a script's own."""
        if self.optimizer is not None:  # type: ignore[attr-defined]
            all_or_nothing(self.optimizer, self.recovery, self._has_moved)  # type: ignore[attr-defined]
        return super()._wrap_model(*args, **kwargs)  # type: ignore[misc]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of the next optimizer step."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._ranks is not None:
            share_buffers(self)
        self._window = _Window(batches)
        return batches, items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The stock step for the last micro-batch of an optimizer step and all before it; nothing for those.

        Raises:
            OutOfBudget: it does not fit in any way that leaves the result as it is; or not on another rank.
            UsageError: a script's own `training_step` does something else in the midst of an optimizer step.
        """
        window = self._window
        if window is not None and window.seen == 0 and len(window.batches) == 1:
            window.batches[0] = inputs  # a training_step of one's own may have made others of them
        if window is not None and window.is_open and window.batches[window.seen] is not inputs:
            raise UsageError(_OWN_STEP.format(type(self).__name__))
        if window is None or window.seen >= len(window.batches) or window.batches[window.seen] is not inputs:
            if window is not None and window.seen == 0:
                logger.warning_once(_UNCOVERED.format(type(self).__name__))
            self._has_moved()  # buffers, perhaps, and those are not kept here
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        window.seen, window.model, window.items = window.seen + 1, model, num_items_in_batch
        if window.seen < len(window.batches):
            device = self.args.device
            return retried(self.recovery, "fetch", lambda: torch.zeros((), device=device))

        def run(module: nn.Module) -> list[torch.Tensor]:
            return self._run(module, window.batches, num_items_in_batch)

        count = len(window.batches)
        return self._sum(run(model) if self._ranks is None else run_together(self, model, run, count))

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        window, trainer = self._window, cast(Any, self)
        if window is not None and window.is_open:
            control = trainer.control
            ended = control.should_epoch_stop or control.should_training_stop
            if not ended or trainer.accelerator.sync_gradients or self._ranks is not None:
                raise UsageError(_OWN_STEP.format(type(self).__name__))  # nothing is saved of that
            self._window = None
            # A callback ended the epoch in the midst of a step: stock has run those, and leaves their gradients.
            losses = self._run(window.model, window.batches[: window.seen], window.items)
            trainer._tr_loss += self._counted(self._sum(losses))
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # One optimizer step's gradients

    def _run(self, model: nn.Module, batches: Sequence[Any], items: Any) -> list[torch.Tensor]:
        """The losses of the pieces, after however many attempts."""
        return self._gradients(model, _Cut(self, model, batches, items))[1]

    def _run_piece(self, model: nn.Module, piece: Piece, items: Any) -> torch.Tensor:
        with self._weighted(piece.weight):
            loss: torch.Tensor = super().training_step(model, piece.batch, items)  # type: ignore[misc]
        return loss if piece.weight == 1.0 else loss * piece.weight

    @contextlib.contextmanager
    def _weighted(self, weight: float) -> Iterator[None]:
        """Around `accelerator.backward`: a user's own `compute_loss` and `training_step` stand above this class."""
        if weight == 1.0:
            yield
            return
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        genuine, own = accelerator.backward, vars(accelerator).get("backward")
        accelerator.backward = lambda loss, **kwargs: genuine(loss * weight, **kwargs)
        try:
            yield
        finally:
            del accelerator.backward
            if own is not None:
                accelerator.backward = own

    def _sum(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """The last loss, after the others were added to the running one, in the order in which the stock loop does."""
        for loss in losses[:-1]:
            share = retried(self.recovery, "loss", partial(self._counted, loss))
            self._tr_loss += share  # type: ignore[attr-defined]  # in place, so not done again
        return losses[-1]

    def _counted(self, loss: torch.Tensor) -> torch.Tensor:
        """What of a loss the stock loop adds to the running one."""
        trainer: Any = self
        if not trainer.args.logging_nan_inf_filter or math.isfinite(loss.item()):
            return loss
        mean: torch.Tensor = trainer._tr_loss / (1 + trainer.state.global_step - trainer._globalstep_last_logged)
        return mean

    # Smaller pieces

    def _measured_kind(self, model: nn.Module, batches: Sequence[Any], items: Any, before: Snapshot) -> LossKind | None:
        """None where nothing says: no batch of this step can be cut, or measuring did not fit either."""
        batch = next((batch for batch in batches if can_be_cut(batch)), None)
        if batch is None:
            return None
        kind: LossKind | None = None
        for most_rows in (MOST_ROWS, MOST_ROWS // 2, 2):
            try:
                with Watch():
                    kind = measured_kind(self, model, batch, items, self._shifted, self._tolerance(model), most_rows)
            # A loss of pairs, say, that refuses a single row; the step itself raises what is wrong.
            except Exception as error:
                logger.warning("the loss cannot be taken apart: %s", error)
                kind = LossKind.WHOLE
            before.restore()
            if kind is not None:
                break
        if kind is not None and kind is not self._kind:
            self.recovery.add("loss", kind=kind.value)
        return kind


@dataclass
class _Cut:
    """An optimizer step's micro-batches as `redoing.Work`."""

    trainer: Any
    model: nn.Module
    batches: Sequence[Any]
    items: Any
    measured: bool = False

    def pieces(self, most_tokens: int | None) -> list[Piece]:
        if most_tokens is not None and self.trainer._kind is None:
            self.trainer._kind = self._measured(Snapshot(self.trainer, self.model))
            if self.trainer._kind is LossKind.WHOLE:
                logger.warning("the loss takes all rows of a micro-batch together: they run at once, as you asked")
        elif most_tokens is not None:
            self._measure_again()
        # NEFTune's noise is the weaker the wider a batch is, padding included.
        widths = getattr(self.trainer.args, "neftune_noise_alpha", None) is not None
        kind = self.trainer._kind or LossKind.WHOLE
        return cut(self.batches, most_tokens, kind, self.trainer._shifted, keep_widths=widths)

    def run(self, piece: Piece) -> torch.Tensor:
        loss: torch.Tensor = self.trainer._run_piece(self.model, piece, self.items)
        return loss

    def finer(self, failed: Piece, before: Snapshot) -> int | None:
        if self.trainer._kind is None:
            self.trainer._kind = self._measured(before)
        return None if self.trainer._kind is None else finer(failed, self.trainer._kind)

    def _measure_again(self) -> None:
        """Now and then: a script's own loss may have a penalty that is zero at first, or a term that comes later."""
        if self.measured or self.trainer._kind is LossKind.WHOLE or not has_own_loss(self.trainer, self.model):
            return
        self.measured = True
        self.trainer._cut_steps += 1
        if self.trainer._cut_steps > _EACH and self.trainer._cut_steps.bit_count() > 1:
            return
        kind = self._measured(Snapshot(self.trainer, self.model))
        if kind is not None and kind is not self.trainer._kind:
            self.trainer._kind = LossKind.WHOLE

    def _measured(self, before: Snapshot) -> LossKind | None:
        self.measured = True
        kind: LossKind | None = self.trainer._measured_kind(self.model, self.batches, self.items, before)
        return kind

    def why(self, failed: Piece) -> str:
        if self.trainer._kind is LossKind.WHOLE:
            return "the loss takes all rows of a micro-batch together, so it cannot be cut"
        if count_rows(failed.batch) != 1:
            found = "its loss leaves out rows without a label"
            if not can_be_cut(failed.batch):
                found = "not every value of the batch belongs to one of its rows"
            elif self.trainer._kind is None:
                found = "its loss could not be measured"
            return f"{failed.tokens} tokens are too many and cannot be cut: {found}"
        return f"a single row of {failed.tokens} tokens is too much"
