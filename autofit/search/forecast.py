"""What candidates are predicted to need before anything runs, asked of a child process that traces them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from autofit.space.candidate import Candidate
from autofit.space.facts import DeviceFacts
from autofit.space.source import ModelSource
from autofit.trial.classify import classify, own_error
from autofit.trial.environment import child_environment
from autofit.trial.job import Job
from autofit.trial.sandbox import Sandbox

ENTRY = "autofit.memory.forecast:run_forecast"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """An estimate of one candidate, as far as a search needs it.

    Attributes:
        device_bytes: as the driver will see it; the upper end where values decide that nobody has.
        tokens_per_second: None where the device's figures are not known (any CPU).
        breakdown_bytes: what they are of, see `memory.breakdown.PARTS`; their sum is without what a bracket adds.
    """

    device_bytes: int
    tokens_per_second: float | None = None
    breakdown_bytes: Mapping[str, int] = field(default_factory=dict, compare=False)

    @property
    def model_bytes(self) -> int:
        """Of parameters and buffers."""
        return sum(self.breakdown_bytes.get(part, 0) for part in ("weights", "adapters", "buffers"))


class Forecaster(Protocol):
    """Predicts candidates, one answer for each: a prediction, or why there is none."""

    def predict(self, candidates: Sequence[Candidate]) -> list[Prediction | str]: ...


@dataclass
class SandboxForecaster:
    """Estimates in a child of the sandbox.

    `checkpointable_layers` are the model's; `calibration` is that of the device, as `memory.calibration` writes it.
    """

    sandbox: Sandbox
    folder: Path
    source: ModelSource
    device: DeviceFacts
    checkpointable_layers: int
    calibration: Mapping[str, Any] | None
    deadline_seconds: float
    _told: dict[Candidate, Prediction] = field(default_factory=dict, init=False, repr=False)

    def breakdown_bytes(self, candidate: Candidate) -> dict[str, int] | None:
        """Of what was predicted last; None for a candidate that was not."""
        told = self._told.get(candidate)
        return None if told is None else dict(told.breakdown_bytes)

    def predict(self, candidates: Sequence[Candidate]) -> list[Prediction | str]:
        """One job for all of them; whatever ends it early is the answer for each."""
        outcome = self.sandbox.run(
            Job(
                entry=ENTRY,
                request={
                    "candidates": [candidate.to_json() for candidate in candidates],
                    "source": asdict(self.source),
                    "device": self.device.to_json(),
                    "checkpointable_layers": self.checkpointable_layers,
                    "calibration": dict(self.calibration) if self.calibration is not None else None,
                },
                folder=self.folder,
                deadline_seconds=self.deadline_seconds,
                env=child_environment(),
            )
        )
        if outcome.result is None:
            error = own_error(outcome)
            status, message = classify(outcome)
            return [str(error) if error is not None else f"{status.value}: {message}"] * len(candidates)
        answers = [prediction_of(estimate) for estimate in outcome.result["estimates"]]
        self._told |= {c: a for c, a in zip(candidates, answers, strict=True) if isinstance(a, Prediction)}
        return answers


def prediction_of(estimate: Mapping[str, Any]) -> Prediction | str:
    """The prediction of an estimate as JSON, or its `error`."""
    if "error" in estimate:
        return str(estimate["error"])
    bracket = estimate["bracket"]
    above = max(0, bracket[1] - estimate["peak_allocated_bytes"]) if bracket else 0
    return Prediction(
        device_bytes=estimate["device_bytes"] + above,
        tokens_per_second=estimate["tokens_per_second"],
        breakdown_bytes=estimate.get("breakdown_bytes", {}),
    )
