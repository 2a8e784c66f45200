"""The search of a run: from the estimates, or by trials alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from autofit.config import RunConfig
from autofit.memory.calibration import load_calibration
from autofit.search.controller import measure
from autofit.search.forecast import SandboxForecaster
from autofit.search.outcome import Observer, SearchOutcome, SearchSpace, TrialStore
from autofit.search.planned import NoForecast, plan_and_probe
from autofit.search.runner import SandboxRunner
from autofit.space.budget import MemoryBudget
from autofit.training.question import Prepared
from autofit.trial.sandbox import Sandbox


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """What a search needs: the question, and where its children run. `work` is the folder of their records; `warn` is
    told what the user should know.

    Weights are random at full size, so that nothing is downloaded before a config fits.
    """

    config: RunConfig
    prepared: Prepared
    budget: MemoryBudget
    sandbox: Sandbox
    work: Path
    warn: Callable[[str], None]

    def runner(self) -> SandboxRunner:
        """Who runs the trials."""
        return SandboxRunner(
            sandbox=self.sandbox,
            folder=self.work / "trials",
            source=replace(self.prepared.source, random_weights=True),
            device=self.prepared.device,
            budget=self.budget,
            lora_alpha=self.config.lora_alpha,
            seed=self.config.seed,
            deadline_seconds=self.config.trial_timeout,
        )

    @cached_property
    def forecaster(self) -> SandboxForecaster:
        """Who estimates, corrected by what `autofit calibrate` found out about the device."""
        calibration = load_calibration(self.prepared.device, self.warn)
        return SandboxForecaster(
            sandbox=self.sandbox,
            folder=self.work / "forecast",
            source=replace(self.prepared.source, random_weights=True),
            device=self.prepared.device,
            checkpointable_layers=self.prepared.model.checkpointable_layers,
            calibration=None if calibration is None else asdict(calibration),
            deadline_seconds=self.config.trial_timeout,
        )

    def search(self, space: SearchSpace, store: TrialStore, on_trial: Observer) -> SearchOutcome:
        """The search that the config asks for; by trials alone where the model cannot be estimated."""
        if self.config.search == "plan":
            try:
                return plan_and_probe(space, self.budget, self.forecaster, self.runner(), store, on_trial)
            except NoForecast as error:
                self.warn(f"this model cannot be estimated ({error}); searching by trials alone")
        return measure(space, self.budget, self.runner(), store, on_trial)
