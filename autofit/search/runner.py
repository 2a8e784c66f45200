"""The real `Runner`: one candidate in a child process of the sandbox."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from autofit.space.budget import MemoryBudget
from autofit.space.candidate import Candidate
from autofit.space.facts import DeviceFacts
from autofit.space.source import ModelSource
from autofit.trial.classify import classify, own_error
from autofit.trial.environment import child_environment
from autofit.trial.job import Job, Outcome
from autofit.trial.request import TrialRequest
from autofit.trial.result import TrialResult, TrialStatus
from autofit.trial.sandbox import Sandbox

ENTRY = "autofit.trial.child:run_trial"


@dataclass
class SandboxRunner:
    """Runs candidates one at a time; each trial's files go to a numbered folder in `folder`."""

    sandbox: Sandbox
    folder: Path
    source: ModelSource
    device: DeviceFacts
    budget: MemoryBudget
    lora_alpha: int
    seed: int
    deadline_seconds: float

    def run(self, candidate: Candidate) -> TrialResult:
        """One trial. Whatever happens in the child comes back as a value.

        Raises:
            AutofitError: the candidate cannot be built at all; no other trial would say anything else.
        """
        request = TrialRequest(
            candidate=candidate,
            source=self.source,
            device=self.device,
            cap_bytes=self.budget.usable_bytes,
            budget_bytes=self.budget.total_bytes,
            lora_alpha=self.lora_alpha,
            seed=self.seed,
        )
        job = Job(
            entry=ENTRY,
            request=request.to_json(),
            folder=self._new_folder(),
            deadline_seconds=self.deadline_seconds,
            env=child_environment(),
        )
        outcome = self.sandbox.run(job)
        error = own_error(outcome)
        if error is not None:
            raise error
        return trial_result(outcome)

    def _new_folder(self) -> Path:
        """The next number; an earlier start of the same run may have left some."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{1 + sum(1 for _ in self.folder.iterdir()):02d}"


def trial_result(outcome: Outcome) -> TrialResult:
    """The result that the child returned, or what its end and its last phase record say."""
    status, message = classify(outcome)
    if status is TrialStatus.FIT and outcome.result is not None:
        return TrialResult.from_json({**outcome.result, "seconds": outcome.seconds})
    known = {f.name for f in fields(TrialResult)} & outcome.phase_record.keys()
    numbers: dict[str, Any] = {name: outcome.phase_record[name] for name in known if name != "phase"}
    if status is not TrialStatus.OOM:
        numbers.pop("projected_bytes", None)
    return TrialResult(
        **{
            **numbers,
            "status": status,
            "phase": outcome.phase,
            "requested_bytes": (outcome.error or {}).get("requested_bytes"),
            "seconds": outcome.seconds,
            "message": message,
        }
    )
