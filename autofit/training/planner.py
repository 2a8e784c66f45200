"""From what a user asks to the plan: a survey, then the estimates, each in a child process. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autofit.config import RunConfig
from autofit.errors import AutofitError, UsageError
from autofit.memory.calibration import load_calibration
from autofit.search.outcome import SearchSpace
from autofit.search.plan import Plan, make_plan
from autofit.space.facts import DataFacts, DeviceFacts, ModelFacts
from autofit.space.plan_request import PlanRequest
from autofit.space.settle import DEFAULT_LENGTH
from autofit.space.source import ModelSource
from autofit.space.target import target_device
from autofit.training.narrator import starts_lower
from autofit.training.question import Prepared, search_space
from autofit.trial.classify import classify, own_error
from autofit.trial.environment import child_environment
from autofit.trial.job import Job
from autofit.trial.sandbox import Sandbox

PRELOAD = ("autofit.training.survey", "autofit.memory.planning", "transformers.models.llama.modeling_llama")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan, what it was asked, and what the user should know about both.

    Attributes:
        assumed_length: whether there was no data to say how long sequences are.
    """

    prepared: Prepared
    space: SearchSpace
    plan: Plan
    notes: tuple[str, ...]
    assumed_length: bool

    def to_json(self) -> dict[str, Any]:
        """What `autofit plan --json` prints."""
        model = {"name": self.prepared.source.model, **self.prepared.model.to_json()}
        return {"model": model, "notes": list(self.notes), **self.plan.to_json()}


def plan_run(config: RunConfig, sandbox: Sandbox, folder: Path, say: Callable[[str], None]) -> Planned:
    """The plan for a config; the sandbox should have `PRELOAD`, `folder` holds the children's records.

    Raises:
        AutofitError: with the exit code and the one line that says what is wrong.
    """
    if config.model is None:
        raise UsageError("nothing to plan: give --model, a folder, a hub id or a name like llama-3-8b")
    say("reading the model" if config.data is None else "reading model and data")
    request = {"model": config.model, "data": config.data, "trust_remote_code": config.trust_remote_code}
    found = ask(sandbox, "autofit.training.survey:run_survey", request, folder)
    prepared = _prepared(config, found)
    space, budget = search_space(config, prepared)
    notes = (*prepared.notes, *starts_lower(config, prepared, space.wish))
    unread: list[str] = []
    calibration = load_calibration(prepared.device, unread.append)
    say("estimating")
    asked = PlanRequest(
        source=prepared.source,
        device=prepared.device,
        wish=space.wish,
        limits=space.limits,
        order=space.order,
        usable_bytes=budget.usable_bytes,
        longest=prepared.model.max_positions or 4 * space.wish.max_seq_length,
        own_dtype=config.dtype is None,
        calibration=None if calibration is None else vars(calibration),
    )
    answer = ask(sandbox, "autofit.memory.planning:run_plan", asked.to_json(), folder)
    plan = make_plan(space.wish, budget, prepared.device, answer)
    return Planned(
        prepared=prepared, space=space, plan=plan, notes=(*notes, *unread), assumed_length=config.data is None
    )


def _prepared(config: RunConfig, found: dict[str, Any]) -> Prepared:
    model = ModelFacts.from_json(found["facts"])
    device, notes = target_device(config.gpu_mem, DeviceFacts.from_json(found["device"]))
    if found["data"] is not None:
        data = DataFacts.from_json(found["data"])
    else:
        data = _assumed(config, model)
        if config.max_seq_length is None:
            notes = (
                *notes,
                f"no --data: sequences of {data.longest:,} tokens are assumed; --max-seq-length says others",
            )
    return Prepared(
        source=ModelSource(model=found["model"], random_weights=True, trust_remote_code=config.trust_remote_code),
        model=model,
        data=data,
        device=device,
        notes=(*notes, *found["notes"]),
    )


def _assumed(config: RunConfig, model: ModelFacts) -> DataFacts:
    """One global batch of sequences of the asked length, or else of 2,048 tokens, or what the model has positions
    for."""
    length = config.max_seq_length or min(DEFAULT_LENGTH, model.max_positions or DEFAULT_LENGTH)
    count = config.global_batch_size
    return DataFacts.of_equal(count, length)


def ask(sandbox: Sandbox, entry: str, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs a job that must succeed; returns what it returned."""
    job = Job(entry=entry, request=request, folder=folder, deadline_seconds=None, env=child_environment())
    outcome = sandbox.run(job)
    if outcome.result is None:
        error = own_error(outcome)
        status, message = classify(outcome)
        raise error or AutofitError(f"plan: {status.value} in {outcome.phase}: {message}")
    return outcome.result
