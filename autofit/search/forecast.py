"""What candidates are predicted to need before anything runs, asked of a child process that traces them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
        model_bytes: of these the parameters and buffers.
        tokens_per_second: None where the device's figures are not known (any CPU).
    """

    device_bytes: int
    model_bytes: int = 0
    tokens_per_second: float | None = None


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
        return [prediction_of(estimate) for estimate in outcome.result["estimates"]]


def prediction_of(estimate: Mapping[str, Any]) -> Prediction | str:
    """The prediction of an estimate as JSON, or its `error`."""
    if "error" in estimate:
        return str(estimate["error"])
    bracket = estimate["bracket"]
    above = max(0, bracket[1] - estimate["peak_allocated_bytes"]) if bracket else 0
    return Prediction(
        device_bytes=estimate["device_bytes"] + above,
        model_bytes=estimate.get("model_bytes", 0),
        tokens_per_second=estimate["tokens_per_second"],
    )
