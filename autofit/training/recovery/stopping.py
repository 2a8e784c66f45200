"""SIGTERM and SIGINT end training at the next step boundary, with a checkpoint; the second one kills.

An evaluation that has begun by then is not waited for, unless the rest of the training depends on it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn
from transformers.utils import logging

from autofit.training.recovery.faults import Record
from autofit.training.recovery.random_states import RandomStates
from autofit.training.recovery.ranks import Ranks

logger = logging.get_logger(__name__)

_SIGNALS: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """SIGTERM ended training, after a checkpoint. Not caught, it ends the process as the signal would: with 143."""


class _EvaluationEnded(BaseException):
    """A signal ended an evaluation within training. Nothing in between may take it for an error of its own."""


@dataclass
class _Evaluation:
    """An evaluation that may be due after a step.

    Attributes:
        counts: whether what it finds decides how training goes on, or which checkpoint is the best.
        began: the random states at its first prediction step.
        saved: whether there is a checkpoint, should it take longer than there is time.
        ended: whether a signal ended it.
    """

    model: nn.Module
    trial: Any
    counts: bool
    began: RandomStates | None = None
    saved: bool = False
    ended: bool = False


class Stop:
    """What was asked for by a signal, and when.

    Attributes:
        number: the signal; None as long as there was none.
        done: whether the checkpoint for it is saved.
        seconds: from the signal until that was whole.
        unevaluated: whether an evaluation that was due is not in it.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.done = self.unevaluated = False
        self.seconds = 0.0
        self._arrived = False
        self._asked = 0.0
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

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

    def saved(self, *, unevaluated: bool) -> None:
        """A checkpoint of the step at which training is to end is whole."""
        self.done, self.seconds = True, time.monotonic() - self._asked
        self.unevaluated |= unevaluated

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
    _evaluation: _Evaluation | None = None
    _saved = False

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
        stop, stock = self._stop, super()._maybe_log_save_evaluate  # type: ignore[misc]
        if stop is None:
            stock(tr_loss, grad_norm, model, trial, *args, **kwargs)
            return
        stopping, evaluates = self._is_to_stop(stop, "the step's end"), trainer.control.should_evaluate
        trainer.control.should_save |= stopping
        self._saved = False
        with self._evaluating(model, trial) as evaluation:
            stock(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if not stopping and (evaluates or self._ranks is None):
            stopping = self._is_to_stop(stop, "the evaluation's end")
        if not stopping:
            return
        # Also where there is one of this step from before the evaluation: its random numbers are counted, too.
        if evaluation.ended or not self._saved:
            trainer._save_checkpoint(model, trial)
            trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        stop.saved(unevaluated=evaluation.ended)
        # With the epoch's last step its end is due as well, and would not be made up for.
        if not float(trainer.state.epoch).is_integer():
            self._end(stop)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self._saved = True

    def _is_to_stop(self, stop: Stop, at: str) -> bool:
        """Whether a signal has come; to any of several ranks, which agree on it, for all must stop at the same step."""
        asked = stop.number or 0
        if self._ranks is not None:
            asked = max(vote["stop"] for vote in self._ranks.agree(at, stop=asked))
        if asked:
            stop.told(asked)
        return asked > 0

    @contextlib.contextmanager
    def _evaluating(self, model: nn.Module, trial: Any) -> Iterator[_Evaluation]:
        """While it is open, a signal ends the evaluation within it at the next prediction step."""
        trainer: Any = self
        counts = trainer.args.metric_for_best_model is not None or isinstance(trainer.eval_dataset, dict)
        evaluation = self._evaluation = _Evaluation(model, trial, counts)
        genuine, own = trainer.prediction_step, trainer.__dict__.get("prediction_step")

        def prediction_step(*args: Any, **kwargs: Any) -> Any:
            self._heed()
            return genuine(*args, **kwargs)

        trainer.prediction_step = prediction_step  # of the instance: a script's own is above this class
        try:
            yield evaluation
        except _EvaluationEnded:
            evaluation.ended = True
            trainer.control.should_evaluate = False  # nor at the epoch's end, where this is its last step
        finally:
            del trainer.prediction_step
            if own is not None:
                trainer.prediction_step = own
            self._evaluation = None

    def _heed(self) -> None:
        """Between the parts of an evaluation: ends it where a signal has come and nothing depends on its end.

        What depends on it is what it finds, where that counts, and the random numbers of the steps that follow, where
        it takes some; several data sets each take one as they begin. A checkpoint is saved then before it goes on.

        Raises:
            _EvaluationEnded: the training's loop evaluates, and a signal has come.
        """
        evaluation, stop = self._evaluation, self._stop
        if evaluation is None or stop is None:
            return
        asked, first = self._is_to_stop(stop, "an evaluation's step"), evaluation.began is None
        began = evaluation.began = evaluation.began or RandomStates()
        if not asked or (first and not evaluation.counts):
            return
        if not (evaluation.counts or self._takes_random_numbers(began)):
            raise _EvaluationEnded
        if not evaluation.saved:
            evaluation.saved = True
            self._save_checkpoint(evaluation.model, evaluation.trial)
            self._saved = False  # with another random state than that which training goes on with

    def _takes_random_numbers(self, began: RandomStates) -> bool:
        moved = began.have_moved()
        if self._ranks is not None:
            moved = any(vote["moved"] for vote in self._ranks.agree("an evaluation's numbers", moved=moved))
        return moved

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]
        if self._stop is not None and self._stop.done:
            self._end(self._stop)

    def _end(self, stop: Stop) -> None:
        trainer: Any = self
        name, step = signal.Signals(stop.number or 0).name, trainer.state.global_step
        left_out = ", without the evaluation that was due" if stop.unevaluated else ""
        logger.warning(
            f"{name}: checkpoint-{step} is saved{left_out}, {stop.seconds:.1f} seconds after it; training ends, and "
            "goes on from there with resume_from_checkpoint=True"
        )
        about = {"unevaluated": True} if stop.unevaluated else {}
        self.recovery.add("stopped", signal=name, step=step, seconds=round(stop.seconds, 3), **about)
        stop.end()
