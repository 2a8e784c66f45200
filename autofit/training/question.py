"""From what a user asks and what preparation found to what the search and the training are asked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autofit.config import RunConfig
from autofit.errors import UsageError
from autofit.search.outcome import SearchSpace
from autofit.space.budget import MemoryBudget, make_budget
from autofit.space.candidate import Candidate
from autofit.space.facts import DataFacts, DeviceFacts, ModelFacts
from autofit.space.ladder import Limits
from autofit.space.source import ModelSource
from autofit.space.wish import check_pins, choose_layout, make_wish
from autofit.step.policy import default_dtype, resolve_policy
from autofit.training.request import Schedule
from autofit.training.workspace import environment


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the preparation found."""

    source: ModelSource
    model: ModelFacts
    data: DataFacts
    device: DeviceFacts
    notes: tuple[str, ...]


def preparation_request(config: RunConfig, folder: Path) -> dict[str, Any]:
    """What `training.prepare.run_preparation` is asked; it writes into `folder`."""
    return {
        "folder": str(folder),
        "model": config.model,
        "data": config.data,
        "random_weights": config.random_weights,
        "trust_remote_code": config.trust_remote_code,
        "eval_fraction": config.eval_fraction,
        "seed": config.seed,
    }


def search_space(config: RunConfig, prepared: Prepared) -> tuple[SearchSpace, MemoryBudget]:
    """What the search is asked.

    Raises:
        UsageError: what the user set contradicts the model or the budget.
    """
    device = prepared.device
    budget = make_budget(config.gpu_mem, device)
    dtype = config.dtype or default_dtype(device)
    layout = choose_layout(prepared.model, prepared.data, device, dtype)
    wish = make_wish(
        prepared.model, prepared.data, budget, dtype, config.global_batch_size, config.asked, config.pin, layout
    )
    resolve_policy(wish, device)
    _check_start(wish, config, device)
    check_pins(wish, frozenset(config.pin), prepared.model, budget)
    limits = Limits(
        global_batch_size=config.global_batch_size,
        checkpointable_layers=prepared.model.checkpointable_layers,
        can_page=device.type == "cuda",
        can_quantize=prepared.model.quantized_bits is None,
        double_quant=config.double_quant,
        pins=frozenset(config.pin),
        minima=config.min,
        allow=frozenset(config.allow),
    )
    return SearchSpace(wish=wish, limits=limits, order=config.order), budget


def _check_start(wish: Candidate, config: RunConfig, device: DeviceFacts) -> None:
    if device.type == "cpu" and wish.offload_activations != "none":
        raise UsageError(f"offload_activations {wish.offload_activations}: on a CPU there is nowhere to offload to")
    for knob, least in config.min.items():
        # A length may be below: no sequence of the data is longer.
        if knob != "max_seq_length" and getattr(wish, knob) < least:
            raise UsageError(
                f"min {knob}={least} is above {getattr(wish, knob)}, where the search starts; pin it instead"
            )


def fingerprint(prepared: Prepared, budget: MemoryBudget, trial_timeout: float) -> str:
    """What a trial's result depends on besides its candidate, as a hash."""
    question = {
        "model": [asdict(prepared.source), prepared.model.to_json()],
        "device": prepared.device.to_json(),
        "budget": asdict(budget),
        "deadline": trial_timeout,
        "environment": environment(),
    }
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def training_schedule(config: RunConfig) -> Schedule:
    """What of the config the training loop needs."""
    return Schedule(
        global_batch_size=config.global_batch_size,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps if config.max_steps is not None else -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        save_steps=config.save_steps,
        seed=config.seed,
        evaluate=config.eval_fraction > 0,
    )
