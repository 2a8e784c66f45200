"""Going on with a run in its folder: only where it is the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from autofit.config import RunConfig
from autofit.errors import UsageError
from autofit.space.candidate import LOSSY, Candidate
from autofit.space.facts import DataFacts
from autofit.training.checkpoints import newest_whole, step_of

# What of a config may differ when a run goes on: none of it changes the result.
_FREE = {"gpu_mem", "output_dir", "search", "order", "pin", "min", "allow", "trial_timeout", "save_steps"}
_FREE |= {"micro_batch_size", "tokens_per_micro_batch", "checkpointed_layers", "offload_activations", "optimizer"}


def last_step(folder: Path) -> int:
    """The step of the newest whole checkpoint in a run's folder; 0 where there is none."""
    newest = newest_whole(folder)
    return 0 if newest is None else step_of(newest)


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
    """Refuses to go on from a checkpoint with a candidate of another result (bits, length or rank).

    Raises:
        UsageError: naming the knob.
    """
    plan = _plan(folder)
    if plan is None:
        return
    for knob in LOSSY:
        if plan["chosen"][knob] != getattr(chosen, knob):
            raise _another(folder, f"{knob} was {plan['chosen'][knob]} and would be {getattr(chosen, knob)}")


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
