"""Training to the end, in as many processes as that takes: what one can't mend, the next does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autofit.errors import AutofitError
from autofit.search.facts import Facts
from autofit.search.forecast import Forecaster
from autofit.search.outcome import SearchSpace
from autofit.space.candidate import LOSSY, Candidate
from autofit.training.mending import (
    Death,
    Patience,
    changed_knobs,
    judge_death,
    next_candidate,
)
from autofit.training.narrator import Narrator
from autofit.training.resume import furthest_step, last_step, note_trained
from autofit.training.workspace import Workspace
from autofit.trial.job import Outcome


@dataclass(frozen=True, kw_only=True)
class Restarting:
    """The training of a run. `start` runs one process from the newest whole checkpoint until it has ended."""

    space: SearchSpace
    facts: Facts
    forecaster: Forecaster
    workspace: Workspace
    narrator: Narrator
    start: Callable[[Candidate], Outcome]

    def run(self, candidate: Candidate) -> dict[str, Any]:
        """Trains; returns what the last process measured, with `mended`: one entry for each that died before.

        Raises:
            AutofitError: a process ended in a way that another one does not mend; names the last checkpoint.
            KeyboardInterrupt: interrupted.
        """
        self.workspace.event("training_start")
        try:
            return self._run(candidate)
        except KeyboardInterrupt:
            self.workspace.event("training_interrupted")
            raise
        except AutofitError as error:
            self.workspace.event("training_failed", reason=str(error))
            folder = self.workspace.folder
            kept = last_step(folder)
            where = f"checkpoint-{kept} of {folder} is the last one" if kept else "no checkpoint was saved"
            raise type(error)(f"{error}; {where}") from error

    def _run(self, candidate: Candidate) -> dict[str, Any]:
        patience, mended = Patience(), list[dict[str, Any]]()
        while True:
            outcome = self.start(candidate)
            if outcome.result is not None:
                return {**outcome.result, "mended": mended}
            death, step = judge_death("train", outcome), furthest_step(self.workspace.folder)
            following = self._following(candidate, death, step, patience)
            mended.append(self._mend(candidate, following, death, step))
            candidate = following

    def _following(self, died: Candidate, death: Death, step: int, patience: Patience) -> Candidate:
        """What the next process trains with.

        Raises:
            AutofitError: there is to be none; the death's own error, and why it stays.
        """
        if not patience.lasts(death.how, step):
            often = f"; not for the first time after step {step:,}" if patience.standstill else ""
            raise type(death.error)(f"{death.error}{often}")
        found = next_candidate(
            died,
            self.space,
            death.how,
            standstill=patience.standstill > 0,
            steps_done=step > 0,
            facts=self.facts,
            forecaster=self.forecaster,
        )
        if found is None:
            raise type(death.error)(f"{death.error}; {_nothing_left(step)}")
        return found

    def _mend(self, died: Candidate, following: Candidate, death: Death, step: int) -> dict[str, Any]:
        """Puts it on record and says it; returns the record."""
        kept = last_step(self.workspace.folder)
        changed = {knob: list(both) for knob, both in changed_knobs(died, following).items()}
        record = {"how": death.how.value, "step": step, "from_step": kept, "changed": changed}
        if changed:
            note_trained(self.workspace, following)
        self.workspace.event("training_mended", **record, reason=str(death.error))
        steps = [f"{knob} {before} → {after}" for knob, (before, after) in changed.items()]
        result = "THIS CHANGES THE RESULT" if changed.keys() & set(LOSSY) else "same result"
        how = f" with {', '.join(steps)} ({result})" if steps else ""
        self.narrator.warn(f"{death.error}; a new process goes on from step {kept:,}{how}")
        return record


def _nothing_left(step: int) -> str:
    what = "nothing that needs less is left within the order, pins, minima and consent of this run"
    return f"{what}; after step {step:,} what changes the result stays as it is" if step else what
