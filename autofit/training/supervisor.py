"""The main job: prepare, search, hand over, train; each in child processes, all on record."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autofit.config import RunConfig
from autofit.errors import AutofitError, NothingFits
from autofit.search.facts import Facts
from autofit.search.fit_report import FitReport, GivenUp, given_up, why_nothing_fits
from autofit.search.outcome import SearchOutcome, SearchSpace, Trial, TrialEvent
from autofit.search.study import TrialStudy
from autofit.space.budget import MemoryBudget
from autofit.space.candidate import Candidate
from autofit.space.facts import DataFacts, DeviceFacts, ModelFacts
from autofit.space.source import ModelSource
from autofit.training.duration import estimated_seconds, optimizer_steps, spoken
from autofit.training.fitting import Fitting
from autofit.training.mending import judge_death
from autofit.training.narrator import Narrator, announce
from autofit.training.question import (
    Prepared,
    fingerprint,
    preparation_request,
    search_space,
    training_schedule,
)
from autofit.training.request import TrainingRequest
from autofit.training.resources import check_resources
from autofit.training.restarting import Restarting
from autofit.training.resume import (
    check_same_config,
    check_same_data,
    check_same_result,
    goes_on_with,
    last_step,
    write_plan,
)
from autofit.training.watching import Watched, run_job
from autofit.training.workspace import Staging, Workspace, choose_folder, environment
from autofit.trial.result import TrialStatus
from autofit.trial.sandbox import Sandbox

PRELOAD = ("autofit.trial.child", "autofit.memory.forecast", "autofit.training.prepare", "autofit.training.child")


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A finished run. `training` is what the training child measured (`training.child.run_training`)."""

    folder: Path
    report: FitReport
    source: ModelSource
    training: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints: the folder, the plan, and the training's steps, losses and peaks."""
        return {"folder": str(self.folder), "plan": self.report.to_json(), "training": self.training}


def execute(config: RunConfig, narrator: Narrator, sandbox: Sandbox) -> RunSummary:
    """Runs a config to its end, its children in the sandbox (which should have `PRELOAD`).

    Raises:
        AutofitError: with the exit code and the one line that says what is wrong.
        KeyboardInterrupt: interrupted; the same output folder goes on from there.
    """
    workspace = Workspace(choose_folder(config.output_dir))
    run = Run(config, narrator, workspace, sandbox)
    try:
        # From the moment that the folder is written to, it is this process's alone.
        with contextlib.ExitStack() as held:
            prepared = run.prepare(held)
            fitting = run.fitting(prepared)
            report = run.fit(fitting)
            training = run.train(fitting, report)
    except KeyboardInterrupt:
        if workspace.folder.is_dir():
            narrator.say(f"to go on: the same command with --output-dir {workspace.folder}")
        raise
    return RunSummary(folder=workspace.folder, report=report, source=prepared.source, training=training)


class Run:
    """One run of a config, step by step: `prepare`, `fitting`, `fit`, `train`."""

    def __init__(self, config: RunConfig, narrator: Narrator, workspace: Workspace, sandbox: Sandbox) -> None:
        self.config, self.narrator, self.workspace, self.sandbox = config, narrator, workspace, sandbox

    # ---- prepare ----

    def prepare(self, held: contextlib.ExitStack) -> Prepared:
        """Facts of device, model and data; the run's folder exists only once they are good, and is then held."""
        target = self.workspace.folder
        check_same_config(target, self.config)
        self.narrator.say("reading model and data")
        with Staging(target) as staging:
            found = self._prepare_job(preparation_request(self.config, staging.folder), staging)
            source = ModelSource(**found["source"])
            if self.config.embedded:
                source = ModelSource(model=str(target / "base"))
            prepared = Prepared(
                source=source,
                model=ModelFacts.from_json(found["model"]),
                data=DataFacts.from_json(found["data"]),
                device=DeviceFacts.from_json(found["device"]),
                notes=tuple(found["notes"]),
            )
            search_space(self.config, prepared)  # what the request itself rules out, before anything is written
            held.enter_context(self.workspace.alone())
            choose_folder(str(target))  # another process may have finished it meanwhile
            check_same_config(target, self.config)
            check_same_data(target, prepared.data)
            staging.publish()
        for note in self.sandbox.notes:
            self.narrator.warn(note)
        for note in prepared.notes:
            self.narrator.say(note)
        return prepared

    def _write_request(self) -> None:
        resolved = json.loads(self.config.model_dump_json(exclude={"output_dir"}))
        self.workspace.write_yaml("resolved.yaml", resolved)
        self.workspace.write_json("env.json", environment())

    # ---- fit ----

    def fitting(self, prepared: Prepared) -> Fitting:
        """What the search needs, and the training once more where a process has died."""
        _, budget = search_space(self.config, prepared)
        return Fitting(
            config=self.config,
            prepared=prepared,
            budget=budget,
            sandbox=self.sandbox,
            work=self.workspace.work,
            warn=self.narrator.warn,
        )

    def fit(self, fitting: Fitting) -> FitReport:
        """Searches for the candidate to train."""
        prepared = fitting.prepared
        space, budget = search_space(self.config, prepared)
        announce(self.narrator, self.config, prepared, budget, space.wish)
        study = TrialStudy(self.workspace.folder, fingerprint(prepared, budget, self.config.trial_timeout))
        outcome = fitting.search(space, study, self._on_trial)
        if outcome.winner is None:
            raise self._no_winner(outcome, space, budget, prepared.device)
        trained = goes_on_with(self.workspace.folder, outcome.winner.candidate)
        check_same_result(self.workspace.folder, trained)
        self._write_request()
        report = self._report(prepared, space.wish, budget, outcome, outcome.winner)
        write_plan(self.workspace, report.to_json(), trained)
        self.workspace.event("chosen", **outcome.winner.candidate.to_json())
        self.narrator.plan(report)
        return report

    def _on_trial(self, event: TrialEvent) -> None:
        if event.kind != "stored":
            result = event.result.to_json() if event.result else {}
            self.workspace.event(
                f"trial_{event.kind}",
                number=event.number,
                reason=event.reason,
                predicted_bytes=event.predicted_bytes,
                **result,
            )
        self.narrator.trial(event)

    def _no_winner(
        self, outcome: SearchOutcome, space: SearchSpace, budget: MemoryBudget, device: DeviceFacts
    ) -> AutofitError:
        reason = why_nothing_fits(outcome, space, budget, device)
        self.workspace.event("nothing_fits", reason=reason)
        crashed = all(trial.result.status is TrialStatus.CRASHED for trial in outcome.trials)
        return AutofitError(reason) if crashed else NothingFits(reason)

    def _report(
        self, prepared: Prepared, wish: Candidate, budget: MemoryBudget, outcome: SearchOutcome, winner: Trial
    ) -> FitReport:
        config, data = self.config, prepared.data
        steps = optimizer_steps(data.num_examples, config.global_batch_size, config.num_train_epochs, config.max_steps)
        speed = winner.result.tokens_per_second
        seconds = None
        if speed:
            seconds = estimated_seconds(data.lengths, winner.candidate, config.global_batch_size, steps, speed)
        return FitReport(
            device=prepared.device,
            budget=budget,
            wish=wish,
            winner=winner,
            given_up=self._given_up(data, wish, winner.candidate),
            trials=outcome.trials,
            num_examples=data.num_examples,
            data_fingerprint=data.fingerprint,
            optimizer_steps=steps,
            seconds_estimated=seconds,
        )

    def _given_up(self, data: DataFacts, wish: Candidate, chosen: Candidate) -> tuple[GivenUp, ...]:
        examples, share = data.truncation_cost(chosen.max_seq_length)
        cost = f"{examples:,} of {data.num_examples:,} examples and {share:.1%} of the trained tokens are cut"
        return given_up(wish, chosen, cost)

    # ---- train ----

    def train(self, fitting: Fitting, report: FitReport) -> dict[str, Any]:
        """Hands the winner, unchanged, to the training child; what that one dies of is mended where it can be."""
        prepared, winner = fitting.prepared, report.winner
        check_resources(
            self.workspace.folder,
            prepared.model,
            winner.candidate,
            prepared.device,
            winner.result.trainable_parameters or 0,
        )
        done = last_step(self.workspace.folder)
        if done:
            self.narrator.say(f"going on from step {done:,} of {report.optimizer_steps:,}")
        if report.seconds_estimated is not None:
            left = report.seconds_estimated * max(0, 1 - done / report.optimizer_steps)
            self.narrator.say(
                f"training {spoken(left)} for {report.optimizer_steps - done:,} steps "
                f"of {self.config.global_batch_size} examples"
            )
        request = TrainingRequest(
            candidate=goes_on_with(self.workspace.folder, winner.candidate),
            source=prepared.source,
            device=prepared.device,
            cap_bytes=report.budget.usable_bytes,
            lora_alpha=self.config.lora_alpha,
            schedule=training_schedule(self.config),
            data_dir=str(self.workspace.work / "data"),
            tokenizer_dir=str(self.workspace.work / "tokenizer"),
            output_dir=str(self.workspace.folder),
        )
        result = self._restarting(fitting, report, request).run(request.candidate)
        self.workspace.event("training_end", **result)
        return result

    def _restarting(self, fitting: Fitting, report: FitReport, request: TrainingRequest) -> Restarting:
        space, budget = search_space(self.config, fitting.prepared)
        facts = Facts(budget.usable_bytes)
        for trial in report.trials:
            facts.add(trial)
        return Restarting(
            space=space,
            facts=facts,
            forecaster=fitting.forecaster,
            workspace=self.workspace,
            narrator=self.narrator,
            start=Watched(self.sandbox, self.workspace, self.narrator, fitting.forecaster, request).run,
        )

    # ---- jobs ----

    def _prepare_job(self, request: dict[str, Any], where: Staging) -> dict[str, Any]:
        """What the preparation returned.

        Raises:
            AutofitError: the child's own one-line error, or how it ended.
        """
        folder = where.folder / "work" / "prepare"
        outcome = run_job(self.sandbox, "autofit.training.prepare:run_preparation", request, folder)
        if outcome.result is None:
            raise judge_death("prepare", outcome).error
        return outcome.result
