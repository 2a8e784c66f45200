"""Recovery for transformers' Trainer and what is made of it: the gradient of the stock class, or `OutOfBudget`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from autofit.errors import OutOfBudget
from autofit.training.recovery.capping import Cap
from autofit.training.recovery.cutting import LossKind, Piece, cut, finer, measure_kind
from autofit.training.recovery.evaluating import RecoveringEvaluation
from autofit.training.recovery.faults import QUIET_STEPS, Record, Strain, Watch, free_memory, held_bytes, retried
from autofit.training.recovery.optimizing import all_or_nothing
from autofit.training.recovery.ranks import Ranks
from autofit.training.recovery.recomputing import keeps_some, recomputing
from autofit.training.recovery.reducing import items_of_all, run_together, share_buffers
from autofit.training.recovery.refusals import check_arguments, check_trainer
from autofit.training.recovery.rows import can_be_cut, count_rows
from autofit.training.recovery.saving import WholeCheckpoints
from autofit.training.recovery.stopping import StopsOnSignals
from autofit.training.recovery.undo import Snapshot

logger = logging.get_logger(__name__)


@dataclass
class _Window:
    """The micro-batches of one optimizer step; `seen` of them have been handed to `training_step`."""

    batches: list[Any]
    seen: int = 0


class RecoveringTrainer(RecoveringEvaluation, StopsOnSignals, WholeCheckpoints):
    """Mixed into a trainer class, before it.

    The stock loop hands over the micro-batches of an optimizer step one by one. All but the last are answered with
    nothing; with the last, all of them run: so they can be cut anew, and done again, as one.

    Args:
        gpu_mem: what the process may use of its device in `train`: a size ("24GB"), a card's name, or "auto".

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
        self._cap = None if gpu_mem is None else Cap(gpu_mem, trainer.model, trainer.args.device)
        self._window: _Window | None = None
        self._most_tokens: int | None = None
        self._quiet = 0
        self._strain = Strain()
        self._kind: LossKind | None = None
        if trainer.optimizer is not None:
            all_or_nothing(trainer.optimizer, self.recovery)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as the stock class does; under `gpu_mem`, where that was given."""
        together = contextlib.nullcontext() if self._ranks is None else self._ranks.together("training")
        with together, self._cap.held() if self._cap is not None else contextlib.nullcontext():
            result = super().train(*args, **kwargs)
        for line in self.recovery.summary():
            logger.warning(line)
        return result

    # The seams of the stock loop

    def get_train_dataloader(self) -> Any:
        """The stock loader; it leaves batches on the host.

        Running out of memory while one is moved would kill its generator, and the epoch would end early without a word.
        """
        loader = super().get_train_dataloader()  # type: ignore[misc]
        if hasattr(loader, "device"):
            loader.device = None
        return loader

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The stock optimizer, whose step is all or nothing."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        all_or_nothing(optimizer, self.recovery)
        return optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of the next optimizer step."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        if self._ranks is not None:
            share_buffers(self)
        self._window = _Window(batches)
        return batches, items

    def _get_num_items_in_batch(self, *args: Any) -> Any:
        stock = super()._get_num_items_in_batch  # type: ignore[misc]

        def count() -> Any:
            return retried(self.recovery, "fetch", lambda: stock(*args))

        of_all = self._ranks is not None and self.args.average_tokens_across_devices  # type: ignore[attr-defined]
        return items_of_all(self, count) if of_all else count()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        stock = super()._clip_grad_norm  # type: ignore[misc]
        groups = self.optimizer.param_groups  # type: ignore[attr-defined]  # sooner gone through than all modules
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        untouched = [gradient._version for gradient in gradients]

        def clip() -> Any:
            if [gradient._version for gradient in gradients] != untouched:
                raise OutOfBudget("clipping ran out of memory half way: again it would clip twice")
            return stock(model)

        return retried(self.recovery, "clipping", clip)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        stock = super()._get_grad_norm  # type: ignore[misc]
        return retried(self.recovery, "clipping", lambda: stock(model, grad_norm=grad_norm))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The stock step for the last micro-batch of an optimizer step and all before it; nothing for those.

        Raises:
            OutOfBudget: it does not fit in any way that leaves the result as it is; or not on another rank.
        """
        window = self._window
        if window is None or window.seen >= len(window.batches) or window.batches[window.seen] is not inputs:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        window.seen += 1
        if window.seen < len(window.batches):
            device = self.args.device  # type: ignore[attr-defined]
            return retried(self.recovery, "fetch", lambda: torch.zeros((), device=device))

        def run(module: nn.Module) -> list[torch.Tensor]:
            return self._run(module, window.batches, num_items_in_batch)

        count = len(window.batches)
        return self._sum(run(model) if self._ranks is None else run_together(self, model, run, count))

    # One optimizer step's gradients

    def _run(self, model: nn.Module, batches: Sequence[Any], items: Any) -> list[torch.Tensor]:
        """The losses of the pieces, after however many attempts."""
        before = retried(self.recovery, "snapshot", lambda: Snapshot(self, model))
        same_again, recompute = True, False
        while True:
            pieces = cut(batches, self._most_tokens, self._kind or LossKind.WHOLE, self._shifted)
            losses: list[torch.Tensor] = []
            with Watch(lambda: held_bytes(model, self.optimizer)) as watch:  # type: ignore[attr-defined]
                self._attempt(model, pieces, items, recompute, losses)
            if watch.fault is None:
                self._grow_back(batches, quiet=same_again and not recompute)
                if self._strain.after_step():
                    self._ease(model, batches, items, pieces)
                return losses
            failed = pieces[min(len(losses), len(pieces) - 1)]
            del losses
            model.zero_grad()  # accelerate's optimizer.zero_grad does nothing within a step
            free_memory()
            before.restore()
            if same_again:
                same_again = False
                self._note(watch, pieces, "freed memory and tried the same again")
                continue
            if self._kind is None:
                self._kind = self._measured_kind(model, batches, items, before)
            most = None if self._kind is None else finer(failed, self._kind)
            if most is not None:
                self._most_tokens = most
                self._note(watch, pieces, f"cut into pieces of at most {most} tokens")
            elif not recompute and keeps_some(model):
                recompute = True
                self._note(watch, pieces, "recomputes activations in this step")
            else:
                self._note(watch, pieces, "gave up")
                raise OutOfBudget(self._why(failed, watch.fault))

    def _attempt(
        self, model: nn.Module, pieces: Sequence[Piece], items: Any, recompute: bool, losses: list[torch.Tensor]
    ) -> None:
        """Adds to `losses` that of each piece as it is through."""
        with recomputing(model) if recompute else contextlib.nullcontext():
            for piece in pieces:
                with self._weighted(piece.weight):
                    loss = super().training_step(model, piece.batch, items)  # type: ignore[misc]
                losses.append(loss if piece.weight == 1.0 else loss * piece.weight)

    @contextlib.contextmanager
    def _weighted(self, weight: float) -> Iterator[None]:
        """Around `accelerator.backward`: a user's own `compute_loss` and `training_step` stand above this class."""
        if weight == 1.0:
            yield
            return
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        genuine = accelerator.backward
        accelerator.backward = lambda loss, **kwargs: genuine(loss * weight, **kwargs)
        try:
            yield
        finally:
            del accelerator.backward

    def _sum(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """The last loss, after the others were added to the running one, in the order in which the stock loop does."""
        trainer: Any = self
        for loss in losses[:-1]:
            if trainer.args.logging_nan_inf_filter and not bool(torch.isfinite(loss)):
                trainer._tr_loss += trainer._tr_loss / (1 + trainer.state.global_step - trainer._globalstep_last_logged)
            else:
                trainer._tr_loss += loss
        return losses[-1]

    # Smaller pieces, and larger ones again

    def _measured_kind(self, model: nn.Module, batches: Sequence[Any], items: Any, before: Snapshot) -> LossKind | None:
        """None where nothing says: no batch of this step can be cut, or measuring did not fit either."""
        batch = next((batch for batch in batches if can_be_cut(batch)), None)
        if batch is None:
            return None
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            return LossKind.WHOLE
        trainer: Any = self

        def loss_of(rows: Any) -> float:
            with torch.no_grad(), trainer.compute_loss_context_manager():
                return float(trainer.compute_loss(model, trainer._prepare_inputs(rows), num_items_in_batch=items))

        kind: LossKind | None = None
        training = model.training
        model.eval()  # no dropout: the comparison is of the loss alone
        try:
            with Watch():
                kind = measure_kind(batch, loss_of, self._shifted, self._tolerance(model))
        finally:
            model.train(training)
        before.restore()
        if kind is not None:
            self.recovery.add("loss", kind=kind.value)
        return kind

    def _ease(self, model: nn.Module, batches: Sequence[Any], items: Any, pieces: Sequence[Piece]) -> None:
        """The next steps in smaller pieces, before one fails."""
        if self._kind is None:
            self._kind = self._measured_kind(model, batches, items, Snapshot(self, model))
        most = None if self._kind is None else finer(max(pieces, key=lambda piece: piece.tokens), self._kind)
        if most is not None:
            self._most_tokens = most
            self.recovery.add("strain", step=self.state.global_step, most_tokens=most)  # type: ignore[attr-defined]

    def _grow_back(self, batches: Sequence[Any], quiet: bool) -> None:
        self._quiet = self._quiet + 1 if quiet else 0
        if self._most_tokens is None or self._quiet < QUIET_STEPS:
            return
        self._quiet = 0
        self._most_tokens *= 2
        whole = all(Piece(batch).tokens <= self._most_tokens for batch in batches)
        self.recovery.add("grow", most_tokens=None if whole else self._most_tokens)
        if whole:
            self._most_tokens = None

    def _note(self, watch: Watch, pieces: Sequence[Piece], did: str) -> None:
        step = self.state.global_step  # type: ignore[attr-defined]
        largest = max(piece.tokens for piece in pieces)
        about = {"step": step, "pieces": len(pieces), "largest_tokens": largest}
        self.recovery.oom(watch, "step", did, **about)

    def _why(self, failed: Piece, fault: str) -> str:
        if self._kind is LossKind.WHOLE:
            what = "the loss takes all rows of a micro-batch together, so it cannot be cut"
        elif count_rows(failed.batch) > 1:
            what = f"{failed.tokens} tokens are too many and cannot be cut: its loss could not be measured"
        else:
            what = f"a single row of {failed.tokens} tokens is too much"
        return f"step {self.state.global_step + 1} does not fit: {what}; {fault}"  # type: ignore[attr-defined]
