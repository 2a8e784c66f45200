"""SIGTERM and SIGINT end training at the next step boundary, with a checkpoint; the second one kills."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn
from transformers.utils import logging

from autofit.training.recovery.faults import Record
from autofit.training.recovery.ranks import Ranks

logger = logging.get_logger(__name__)

_SIGNALS: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """SIGTERM ended training, after a checkpoint. Not caught, it ends the process as the signal would: with 143."""


class Stop:
    """What was asked for by a signal, and when.

    Attributes:
        number: the signal; None as long as there was none.
        done: whether the checkpoint for it is saved.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.done = False
        self._arrived = False
        self._asked = 0.0
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    @property
    def seconds(self) -> float:
        """Since the signal."""
        return time.monotonic() - self._asked

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """While it is open, signals are heeded; then those who did before do again."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN and before is not None:  # ignored stays so, as under nohup
                    self._before[number] = before
                    signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, before in self._before.items():
                signal.signal(number, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._arrived:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._arrived = True
        self.told(number)
        if os.getpid() == self._process and self._had_a_handler(number):  # workers of loaders inherit this one
            self._before[number](number, frame)

    def told(self, number: int) -> None:
        """A signal came, here or to another rank; that of a rank does not make the one that comes here the second."""
        if self.number is None:
            self.number, self._asked = number, time.monotonic()

    def _had_a_handler(self, number: int) -> bool:
        return callable(self._before[number]) and self._before[number] is not signal.default_int_handler

    def unheeded(self) -> int | None:
        """The signal that came too late to be heeded, and that nobody else got either."""
        if self.number is None or self.done or self._had_a_handler(self.number):
            return None
        return self.number

    def end(self) -> None:
        """Leaves training.

        Raises:
            Stopped: for SIGTERM.
            KeyboardInterrupt: for SIGINT.
        """
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Stopped(128 + int(self.number or 0))


class StopsOnSignals:
    """Mixed into a trainer class, before it, and after what makes its checkpoints."""

    recovery: Record
    _ranks: Ranks | None = None
    _stop: Stop | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as the stock class does, until a signal.

        Handlers that were there before are called, too. What the stock class does after training (the best model, the
        callbacks' ends) is left away then: the process is to end in time.

        Raises:
            Stopped: SIGTERM came; a checkpoint is saved.
            KeyboardInterrupt: SIGINT came; a checkpoint is saved.
        """
        stop = self._stop = Stop()
        try:
            with stop.heeded():
                result = super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._stop = None
        late = stop.unheeded()
        if late is not None:
            os.kill(os.getpid(), late)
        return result

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        trainer: Any = self
        stop = self._stop
        stopping = self._is_to_stop(stop)
        if stopping:
            trainer.control.should_save = True
            if trainer.control.should_evaluate:
                trainer._save_checkpoint(model, trial)  # evaluation may take longer than there is time
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)  # type: ignore[misc]
        if stop is not None and stopping:
            self._note_stop(stop)
            # With the epoch's last step its end is due as well, and would not be made up for.
            if not float(trainer.state.epoch).is_integer():
                stop.end()

    def _is_to_stop(self, stop: Stop | None) -> bool:
        """Whether a signal has come; to any of several ranks, which agree on it, for all must stop at the same step."""
        asked = (stop.number if stop is not None else None) or 0
        if self._ranks is not None:
            asked = max(vote["stop"] for vote in self._ranks.agree("the step's end", stop=asked))
        if stop is not None and asked:
            stop.told(asked)
        return stop is not None and asked > 0

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]
        if self._stop is not None and self._stop.done:
            self._stop.end()

    def _note_stop(self, stop: Stop) -> None:
        if stop.done:
            return
        stop.done = True
        trainer: Any = self
        name, step = signal.Signals(stop.number or 0).name, trainer.state.global_step
        logger.warning(f"{name}: checkpoint-{step} is saved, {stop.seconds:.1f} seconds after it; training ends")
        self.recovery.add("stopped", signal=name, step=step, seconds=round(stop.seconds, 3))
