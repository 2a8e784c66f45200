"""Going on with a run in its folder: only where it is the same run."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import yaml

from autofit.config import RunConfig
from autofit.errors import UsageError
from autofit.space.candidate import LOSSY, Candidate
from autofit.space.facts import DataFacts
from autofit.training.checkpoints import newest_whole, step_of
from autofit.training.workspace import Workspace

# What of a config may differ when a run goes on: none of it changes the result.
_FREE = {"gpu_mem", "output_dir", "search", "order", "pin", "min", "allow", "trial_timeout", "save_steps"}
_FREE |= {"micro_batch_size", "tokens_per_micro_batch", "checkpointed_layers", "offload_activations", "optimizer"}


def last_step(folder: Path) -> int:
    """The step of the newest whole checkpoint in a run's folder; 0 where there is none."""
    newest = newest_whole(folder)
    return 0 if newest is None else step_of(newest)


def furthest_step(folder: Path) -> int:
    """The highest step that any process of the run has completed, in a checkpoint or not; 0 before the first."""
    steps = [last_step(folder)]
    metrics = folder / "metrics.jsonl"
    for text in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        with contextlib.suppress(ValueError, KeyError):  # the last line, torn by a kill
            steps.append(json.loads(text)["step"])
    return max(steps)


def write_plan(workspace: Workspace, plan: dict[str, Any], trained: Candidate) -> None:
    """Writes plan.json; what is trained is named there where it is no longer what was chosen."""
    same = plan["chosen"] == trained.to_json()
    plan = {key: value for key, value in plan.items() if key != "trained"}
    workspace.write_json("plan.json", plan if same else {**plan, "trained": trained.to_json()})


def note_trained(workspace: Workspace, trained: Candidate) -> None:
    """Puts into plan.json what is trained from now on."""
    write_plan(workspace, json.loads((workspace.folder / "plan.json").read_text(encoding="utf-8")), trained)


def goes_on_with(folder: Path, chosen: Candidate) -> Candidate:
    """What the run in a folder had come to train instead, where the same was chosen then; else what is chosen now."""
    plan = _plan(folder)
    if plan is None or "trained" not in plan or Candidate.from_json(plan["chosen"]) != chosen:
        return chosen
    return Candidate.from_json(plan["trained"])


def states_of(optimizer: str) -> str:
    """What an optimizer's states are like: those of another kind cannot be loaded. Paged or not is the same."""
    return optimizer.removeprefix("paged_")


def check_same_config(folder: Path, config: RunConfig) -> None:
    """Refuses to go on from a checkpoint with a config that gives another result.

    Raises:
        UsageError: naming the first difference.
    """
    if last_step(folder) == 0:
        return
    before = yaml.safe_load((folder / "resolved.yaml").read_text(encoding="utf-8"))
    now = json.loads(config.model_dump_json())
    for name in RunConfig.model_fields.keys() - _FREE:
        if before.get(name) != now[name]:
            raise _another(folder, f"{name} was {before.get(name)!r} and is {now[name]!r}")


def check_same_data(folder: Path, data: DataFacts) -> None:
    """Refuses to go on from a checkpoint with other data.

    Raises:
        UsageError: tokens or labels are not those that the checkpoint was trained on.
    """
    plan = _plan(folder)
    if plan is not None and plan["data_fingerprint"] != data.fingerprint:
        raise _another(folder, "the data has changed")


def check_same_result(folder: Path, chosen: Candidate) -> None:
    """Refuses to go on from a checkpoint with a candidate of another result (bits, length or rank), or with an
    optimizer that cannot load the states of the one before.

    Raises:
        UsageError: naming the knob.
    """
    plan = _plan(folder)
    if plan is None:
        return
    before = plan.get("trained", plan["chosen"])
    for knob in LOSSY:
        if before[knob] != getattr(chosen, knob):
            raise _another(folder, f"{knob} was {before[knob]} and would be {getattr(chosen, knob)}")
    if states_of(before["optimizer"]) != states_of(chosen.optimizer):
        raise _another(folder, f"optimizer was {before['optimizer']} and would be {chosen.optimizer}")


def _plan(folder: Path) -> dict[str, Any] | None:
    file = folder / "plan.json"
    if last_step(folder) == 0 or not file.is_file():
        return None
    plan: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return plan


def _another(folder: Path, difference: str) -> UsageError:
    return UsageError(
        f"output-dir {folder} holds a run at step {last_step(folder)} that this would not continue: {difference}; "
        "ask for the same, or name another --output-dir"
    )
