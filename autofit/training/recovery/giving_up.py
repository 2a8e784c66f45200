"""A checkpoint of the last completed step, where the next one does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autofit.errors import AutofitError, OutOfBudget
from autofit.training.recovery.faults import free_memory
from autofit.training.recovery.random_states import RandomStates
from autofit.training.recovery.ranks import Ranks
from autofit.training.recovery.undo import Snapshot
from autofit.trial.classify import classify_exception


class SavesLastStep:
    """Mixed into a trainer class, before it, by what makes its checkpoints."""

    _ranks: Ranks | None = None
    # Of a step that has begun, and has not moved the weights: the random states then, or all that a step touches.
    _begun: RandomStates | Snapshot | None = None
    # Tokens and operations that the steps before it took.
    _done: tuple[int, float] = (0, 0.0)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as the stock class does; the last completed step is saved before it is raised that one does not fit.

        That may be in fetching it, in its passes, in clipping, or in an optimizer's step that moved nothing.
        """
        self._begun = None
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        except Exception as error:
            if isinstance(error, OutOfBudget) or classify_exception(error) is not None:
                self._save_last_step()
            raise
        finally:
            self._begun = None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The stock micro-batches of the next step, which begins by that."""
        trainer: Any = self
        self._done = (trainer.state.num_input_tokens_seen, trainer.current_flos)
        self._begun = RandomStates() if self._saves() else None
        found = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self._begun = None  # until the step has looked what it begins with
        return found

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._has_moved()
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]

    def _has_moved(self) -> None:
        """From now on the weights are not, or not surely, those of the last completed step."""
        self._begun = None

    def _saves(self) -> bool:
        strategy = self.args.save_strategy  # type: ignore[attr-defined]
        return str(getattr(strategy, "value", strategy)) != "no"

    def _save_last_step(self) -> None:
        """None where the user wants none or there is one; where the next step has moved the weights; with an epoch's
        first step, whose sampler has drawn its seed; of several ranks, which do not all give up at this moment; or
        where it cannot be written.
        """
        trainer: Any = self
        state, begun = trainer.state, self._begun
        final = Path(trainer.args.output_dir) / f"checkpoint-{state.global_step}"
        between = state.global_step > 0 and not float(state.epoch or 0).is_integer()
        if begun is None or not (self._saves() and between and self._ranks is None) or final.exists():
            return
        trainer.model.zero_grad()
        free_memory()
        try:
            if isinstance(begun, Snapshot):
                begun.restore(weights_moved=True)
            else:
                begun.restore()
            state.num_input_tokens_seen, trainer.current_flos = self._done
            trainer._save_checkpoint(trainer.model, None)
        except (AutofitError, RuntimeError) as error:
            trainer._warn_of_checkpoint(f"the last step could not be saved: {error}")
