"""The trials of one search, one after another: begun and ended in the store, told to the observer, kept as facts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autofit.search.facts import Facts
from autofit.search.outcome import Observer, Runner, Trial, TrialEvent, TrialStore
from autofit.space.candidate import Candidate
from autofit.trial.result import TrialStatus

MAX_TRIALS = 8


@dataclass(frozen=True)
class Choice:
    """The next candidate, why, and what it is predicted to need (bytes; None: not predicted)."""

    candidate: Candidate
    reason: str
    predicted_bytes: int | None = None


class Attempts:
    """Runs choices. A trial that the store has is not run again; what the runner raises leaves it as not begun."""

    def __init__(self, facts: Facts, runner: Runner, store: TrialStore, on_trial: Observer) -> None:
        self.facts = facts
        self._runner, self._store, self._on_trial = runner, store, on_trial

    @property
    def left(self) -> int:
        return MAX_TRIALS - len(self.facts.trials)

    def run(self, choice: Choice) -> Trial:
        """Tries the candidate and takes the trial in as a fact."""
        candidate = choice.candidate
        trial = self._store.finished(candidate)
        if trial is not None:
            self._tell("stored", trial.number, choice, trial)
        else:
            number = self._store.begin(candidate)
            self._tell("start", number, choice)
            try:
                result = self._runner.run(candidate)
            except BaseException:
                self._store.abandon(number)
                raise
            self._store.end(number, result)
            trial = Trial(number=number, candidate=candidate, result=result)
            self._tell("end", number, choice, trial)
        trial = replace(trial, predicted_bytes=choice.predicted_bytes)
        self.facts.add(trial, choice.predicted_bytes)
        return trial

    def _tell(self, kind: str, number: int, choice: Choice, trial: Trial | None = None) -> None:
        self._on_trial(
            TrialEvent(
                kind=kind,
                number=number,
                candidate=choice.candidate,
                reason=choice.reason,
                predicted_bytes=choice.predicted_bytes,
                result=trial.result if trial else None,
            )
        )

    def crash_alike(self) -> bool:
        """Whether the first two trials crashed with the same last line: then it is no question of memory."""
        first = self.facts.trials[:2]
        lasts = {t.result.message.strip().rpartition("\n")[2] for t in first}
        crashed = all(t.result.status is TrialStatus.CRASHED for t in first)
        return len(first) == 2 and crashed and len(lasts) == 1
