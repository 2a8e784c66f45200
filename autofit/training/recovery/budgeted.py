"""A trainer held to `gpu_mem`, which begins in a way that should fit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers.training_args import OptimizerNames
from transformers.utils import logging

from autofit.training.recovery.capping import Cap
from autofit.training.recovery.faults import Record
from autofit.training.recovery.foresight import foresee
from autofit.training.recovery.redoing import RedoesSteps
from autofit.training.resume import states_of

logger = logging.get_logger(__name__)


class HeldToBudget(RedoesSteps):
    """Mixed into a trainer class: caps its process, and looks ahead at its first step."""

    recovery: Record
    _foresees = True
    _cap: Cap | None = None
    # The script's optimizer, and that with paged states in its place, where either may be taken.
    _optimizers: tuple[OptimizerNames, OptimizerNames] | None = None
    _optim: OptimizerNames | None = None

    def _hold_to(self, gpu_mem: str | None) -> None:
        if gpu_mem is None:
            return
        trainer: Any = self
        self._cap = Cap(gpu_mem, trainer.model, trainer.args.device)
        if self._foresees:
            self._look_ahead(self._cap)

    def _look_ahead(self, cap: Cap) -> None:
        """Has the first step run in the fastest way that is estimated to fit."""
        trainer: Any = self
        try:
            found = foresee(trainer, cap.device, cap.usable_bytes)
        except Exception as error:  # of data and adapters there are more kinds than are known here
            logger.warning("gpu_mem: the first step could not be estimated: %s: %s", type(error).__name__, error)
            return
        if found is None:
            return
        way, asked = found.way, found.asked
        self.recovery.estimated_bytes = found.estimated_bytes
        if found.paged is not None:
            self._optimizers = (OptimizerNames(trainer.args.optim), OptimizerNames(found.paged))
            self._optim = self._optimizers[way.candidate.optimizer != asked.candidate.optimizer]
        said = found.said()
        if said is None:
            return
        self._plan(way.tokens if way.rows < asked.rows else None, way.how)
        self.recovery.add("foreseen", needed_bytes=found.needed_bytes, said=said)
        logger.warning("gpu_mem: %s", said)

    @contextlib.contextmanager
    def _within_budget(self) -> Iterator[None]:
        trainer: Any = self
        with contextlib.nullcontext() if self._cap is None else self._cap.held(trainer.model):
            yield

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The stock optimizer; with paged states where that was foreseen, or a checkpoint's are such."""
        arguments = self.args  # type: ignore[attr-defined]
        asked = arguments.optim
        arguments.optim = self._optim or asked
        try:
            return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        finally:
            arguments.optim = asked

    def _take_states_of(self, optimizer: str) -> None:
        """Has the optimizer be the one whose states a checkpoint has, where both fit the script."""
        for optim in self._optimizers or ():
            if states_of(optim) == optimizer:
                self._optim = optim
