"""Batches stay on the host until they are needed; running out of memory as one is moved ends no epoch early."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers.utils import logging

from autofit.training.recovery.faults import Record, retried
from autofit.training.recovery.ranks import Ranks
from autofit.training.recovery.reducing import items_of_all

logger = logging.get_logger(__name__)

_ANSWERS = (
    "{}: with gradient_accumulation_steps, a training_step of its own gets zero for all micro-batches of a step but "
    "the last, with which all of them run: only then are there gradients; what is logged is the stock class's. A step "
    "of its own that does not call the stock one is not done again"
)


class FetchesOnHost:
    """Mixed into a trainer class, before it."""

    recovery: Record
    args: Any
    _ranks: Ranks | None = None

    def get_train_dataloader(self) -> Any:
        """The stock loader; it leaves batches on the host.

        Running out of memory while one is moved would kill its generator, and the epoch would end early without a word.
        """
        loader = super().get_train_dataloader()  # type: ignore[misc]
        if hasattr(loader, "device"):
            loader.device = None
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The stock micro-batches of the next step, moved already where a script's own `training_step` may want that.

        The stock one moves them itself.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        if has_own_step(self):
            if len(batches) > 1:
                logger.warning_once(_ANSWERS.format(type(self).__name__))
            batches = [retried(self.recovery, "fetch", partial(send_to_device, batch, device)) for batch in batches]
        return batches, items

    def _get_num_items_in_batch(self, *args: Any) -> Any:
        stock = super()._get_num_items_in_batch  # type: ignore[misc]

        def count() -> Any:
            return retried(self.recovery, "fetch", lambda: stock(*args))

        return items_of_all(self, count) if self._ranks and self.args.average_tokens_across_devices else count()

    def _prepare_input(self, data: Any) -> Any:
        """Moved as the stock class and its loader do together: also what is no tensor, and has a `to`."""
        if isinstance(data, (torch.Tensor, Mapping, tuple, list)) or not hasattr(data, "to"):
            return super()._prepare_input(data)  # type: ignore[misc]
        return send_to_device(data, self.args.device)


def has_own_step(trainer: Any) -> bool:
    """Whether a script's `training_step` stands above ours."""
    return not str(getattr(trainer.training_step, "__module__", "")).startswith("autofit.")
