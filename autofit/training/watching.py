"""A job's process from its start to its end; the training's is shown and listened to meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autofit.search.forecast import SandboxForecaster
from autofit.space.candidate import Candidate
from autofit.training.duration import spoken
from autofit.training.narrator import Narrator
from autofit.training.request import TrainingRequest
from autofit.training.stalling import Listener, Silence, Stalled
from autofit.training.workspace import Workspace
from autofit.trial.environment import child_environment
from autofit.trial.files import read_json
from autofit.trial.job import Job, Outcome
from autofit.trial.sandbox import Sandbox

# An interrupted training ends its step and saves; a second Ctrl-C ends it at once.
GRACE_SECONDS = 300.0


def run_job(
    sandbox: Sandbox, entry: str, request: dict[str, Any], folder: Path, poll: Callable[[], None] | None = None
) -> Outcome:
    """Runs a job without a deadline to its end, whichever that is.

    Raises:
        KeyboardInterrupt: it was told to end.
    """
    job = Job(
        entry=entry,
        request=request,
        folder=folder,
        deadline_seconds=None,
        env=child_environment(),
        grace_seconds=GRACE_SECONDS,
    )
    outcome = sandbox.run(job, poll)
    if outcome.result is not None and outcome.result.get("interrupted"):
        raise KeyboardInterrupt
    return outcome


@dataclass(frozen=True)
class Watched:
    """The training's processes; each goes on from the newest whole checkpoint."""

    sandbox: Sandbox
    workspace: Workspace
    narrator: Narrator
    forecaster: SandboxForecaster
    request: TrainingRequest

    def run(self, candidate: Candidate) -> Outcome:
        """Runs one until it has ended, or has done nothing for so long that it is ended (`timed_out`).

        Raises:
            KeyboardInterrupt: it was told to end.
        """
        estimated = self.forecaster.breakdown_bytes(candidate)
        asked = replace(self.request, candidate=candidate, estimated_bytes=estimated).to_json()
        listener = Listener()
        try:
            outcome = run_job(
                self.sandbox,
                "autofit.training.child:run_training",
                asked,
                self._folder,
                lambda: self._listen(listener),
            )
        except Stalled:
            return self._stalled(listener)
        self._progress()
        return outcome

    @property
    def _folder(self) -> Path:
        return self.workspace.work / "train"

    def _progress(self) -> dict[str, Any]:
        """Shows the process's record of its phase, and returns it."""
        record = read_json(self._folder / "phase.json") or {}
        if record:
            self.narrator.training(record)
        return record

    def _listen(self, listener: Listener) -> None:
        record = self._progress()
        silence = listener.hears(record)
        if silence is None:
            return
        phase, step, seconds = record.get("phase", "start"), record.get("step", 0), round(listener.seconds)
        ends = silence is Silence.END
        self.workspace.event("training_stalled", phase=phase, step=step, seconds=seconds, ended=ends)
        said = f"training has done nothing for {spoken(seconds)}, in {phase} after step {step:,}"
        self.narrator.warn(f"{said}: it is ended" if ends else f"{said}; it may hang")
        if ends:
            raise Stalled

    def _stalled(self, listener: Listener) -> Outcome:
        """How the process ended that had stalled; one that was only slow has ended its step and saved."""
        outcome = self.sandbox.last_outcome
        assert outcome is not None
        return replace(outcome, result=None, error=None, timed_out=True, interrupted=False, seconds=listener.seconds)
