"""A search's trials on disk: an Optuna study in the run's folder, and `trials.jsonl` derived from it.

The intent to run a trial is on disk before it runs, so a search that was killed, even together with its trial, goes
on where it was. One controller at a time uses a run's folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autofit.search.outcome import Trial
from autofit.space.candidate import Candidate
from autofit.trial.result import TrialResult, TrialStatus

if TYPE_CHECKING:
    import optuna  # half a second; imported when a study is opened

JOURNAL = "study.journal"
TRIALS = "trials.jsonl"
_NAME = "autofit"
_DIED_TWICE = "the controller died twice during this trial"


class TrialStudy:
    """The trials of one search in a run's folder (a `TrialStore`).

    A trial that was running when the controller died is run once more; if that happens again it is CRASHED.

    Args:
        folder: the run's folder; made if it is missing.
        fingerprint: names the question (model, data, budget, device, versions). Where the stored study answers
            another, it is set aside as `study.journal.1`, `.2`, … and a fresh one begins.

    Raises:
        OSError: the folder or the journal cannot be written.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        journal = folder / JOURNAL
        _mend(journal)
        self._study = _open(journal)
        stored = self._study.user_attrs.get("fingerprint")
        if stored != fingerprint:
            if self._study.get_trials(deepcopy=False):
                os.replace(journal, _aside(journal))
                self._study = _open(journal)
            self._study.set_user_attr("fingerprint", fingerprint)
        self._settle()
        self._write_trials()

    def finished(self, candidate: Candidate) -> Trial | None:
        """The trial of this candidate, if it has ended."""
        return next((t for t in self.trials() if t.candidate == candidate), None)

    def trials(self) -> list[Trial]:
        """All that have ended, by number."""
        return [
            Trial(number=t.number, candidate=_candidate(t), result=TrialResult.from_json(t.user_attrs["result"]))
            for t in self._study.get_trials(deepcopy=False)
            if t.state.is_finished()
        ]

    def begin(self, candidate: Candidate) -> int:
        """Puts the intent on disk; returns the trial's number, the old one for a trial that is begun again."""
        again = next((t for t in self._running() if _candidate(t) == candidate), None)
        if again is not None:
            self._set(again.number, "attempts", again.user_attrs["attempts"] + 1)
            return again.number
        from optuna.trial import TrialState, create_trial

        attrs = {"candidate": candidate.to_json(), "attempts": 1}
        self._study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs=attrs))
        return self._study.get_trials(deepcopy=False)[-1].number

    def end(self, number: int, result: TrialResult) -> None:
        """Stores the result and rewrites `trials.jsonl`."""
        self._set(number, "result", result.to_json())
        self._tell(number, result)
        self._write_trials()

    def abandon(self, number: int) -> None:
        """The trial was interrupted from outside; that does not count as the controller's death."""
        attempts = self._study.get_trials(deepcopy=False)[number].user_attrs["attempts"]
        self._set(number, "attempts", attempts - 1)

    def _settle(self) -> None:
        """Ends the trials that a dead controller left running, as far as they are not to be run again."""
        for trial in self._running():
            if "result" in trial.user_attrs:
                self._tell(trial.number, TrialResult.from_json(trial.user_attrs["result"]))
            elif trial.user_attrs["attempts"] >= 2:
                self.end(trial.number, TrialResult(status=TrialStatus.CRASHED, phase="unknown", message=_DIED_TWICE))

    def _running(self) -> list[optuna.trial.FrozenTrial]:
        return [t for t in self._study.get_trials(deepcopy=False) if not t.state.is_finished()]

    def _set(self, number: int, key: str, value: Any) -> None:
        from optuna.trial import Trial as OptunaTrial

        trial_id = self._study.get_trials(deepcopy=False)[number]._trial_id
        OptunaTrial(self._study, trial_id).set_user_attr(key, value)

    def _tell(self, number: int, result: TrialResult) -> None:
        from optuna.trial import TrialState

        if result.status is TrialStatus.FIT:
            self._study.tell(number, result.tokens_per_second or 0.0)
        else:
            self._study.tell(number, state=TrialState.FAIL)

    def _write_trials(self) -> None:
        lines = [json.dumps({"number": t.number, **t.candidate.to_json(), **t.result.to_json()}) for t in self.trials()]
        whole = self._folder / TRIALS
        beside = whole.with_suffix(".tmp")
        with beside.open("w", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, whole)


def _candidate(trial: optuna.trial.FrozenTrial) -> Candidate:
    return Candidate.from_json(trial.user_attrs["candidate"])


def _open(journal: Path) -> optuna.study.Study:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # The default lock, a symlink, spins for ever where it is stale and the path relative.
    backend = JournalFileBackend(str(journal), lock_obj=JournalFileOpenLock(str(journal)))
    return optuna.create_study(
        storage=JournalStorage(backend), study_name=_NAME, direction="maximize", load_if_exists=True
    )


def _mend(journal: Path) -> None:
    """Cuts a torn end off the journal (Optuna cannot read one) and takes away a dead controller's lock."""
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    if not journal.exists():
        return
    good = 0
    with journal.open("r+b") as file:
        for line in file:
            if not (line.endswith(b"\n") and _is_json(line)):
                break
            good += len(line)
        file.truncate(good)


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _aside(journal: Path) -> Path:
    number = 1
    while (other := journal.with_name(f"{journal.name}.{number}")).exists():
        number += 1
    return other
