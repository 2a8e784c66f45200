"""The search from a script: what a stock trainer's arguments should be so that the run fits and is fastest."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTConfig

from autofit.config import load_run_config
from autofit.errors import NothingFits, UsageError
from autofit.search.fit_report import why_nothing_fits
from autofit.search.outcome import SearchOutcome, SearchSpace, TrialEvent
from autofit.search.study import TrialStudy
from autofit.space.candidate import LOSSY, Candidate, every_n_layers
from autofit.space.facts import DataFacts, DeviceFacts, ModelFacts
from autofit.space.ladder import RUNGS, check_knob
from autofit.space.source import ModelSource
from autofit.step.configs import load_config
from autofit.step.model import load_base
from autofit.step.policy import resolve_policy
from autofit.training.fitting import Fitting
from autofit.training.model_settings import model_settings
from autofit.training.planner import ask
from autofit.training.question import Prepared, fingerprint, search_space
from autofit.training.scripts import longest_of, settings_of
from autofit.trial.sandbox import Sandbox

PRELOAD = ("autofit.trial.child", "autofit.memory.forecast", "autofit.training.survey")
# What moves unless `search` releases more: neither changes a result.
_MOVES = ("batch", "checkpointing")
_log = logging.getLogger("autofit")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What was found.

    Attributes:
        args: the script's arguments, with the micro-batch, its accumulation and the checkpointing that fit. Their
            product of micro-batch and accumulation is the script's.
        peft_config: the script's; with another rank only where `search` released it.
        candidate: what was chosen.
        outcome: all trials.
    """

    args: TrainingArguments
    peft_config: LoraConfig
    candidate: Candidate
    outcome: SearchOutcome
    source: ModelSource
    device: DeviceFacts

    def load_model(self) -> PreTrainedModel:
        """The pretrained base with the chosen bits, on the device, without adapter: the trainer adds that.

        Raises:
            UsageError, AccessError: as transformers finds the weights missing, broken or out of reach.
        """
        policy = resolve_policy(self.candidate, self.device)
        base = load_base(load_config(self.source), self.candidate, self.source, policy)
        base.config.use_cache = False
        return base


def fit(
    model: str,
    *,
    train_dataset: Any,
    args: TrainingArguments,
    peft_config: LoraConfig,
    gpu_mem: str = "auto",
    search: Sequence[str] = (),
    trial_timeout: float = 600.0,
) -> Fit:
    """Estimates and tries the step that this script will run, with random weights, and says with which arguments.

    What the script sets stays, of the model too (`model_init_kwargs`), except checkpointing and the micro-batch: the
    product of `per_device_train_batch_size` and `gradient_accumulation_steps` is kept. The trials run in child
    processes; this one must not hold the card yet.

    Args:
        model: a folder or a hub id.
        train_dataset: the script's; its `input_ids` say how long sequences are, else `args.max_length` does.
        args: an `SFTConfig` for `AutoFitSFTTrainer`, or `TrainingArguments` for `AutoFitTrainer`.
        gpu_mem: a size ("24GB"), a card's name, or "auto".
        search: knobs that change the result and may move, too: "bits", "seq", "rank".
        trial_timeout: seconds.

    Raises:
        UsageError: what contradicts itself, or cannot be searched.
        NothingFits: not even the least does; says what came nearest.
    """
    _check_card_is_free()
    step = "sft" if isinstance(args, SFTConfig) else "trainer"
    released = _released(search)
    asked = settings_of(args, peft_config, longest_of(train_dataset, args))
    of_model = model_settings(model, args)
    asked |= {"dtype": of_model.dtype, "quantization_bits": of_model.bits, "double_quant": of_model.double_quant}
    config = load_run_config(
        None,
        {
            "model": model,
            "gpu_mem": gpu_mem,
            "seed": args.seed,
            "trial_timeout": trial_timeout,
            "order": [*_MOVES, *(name for name in RUNGS if RUNGS[name] in released)],
            "allow": [*released] or ["none"],
            **asked,
        },
    )
    with Sandbox(preload=PRELOAD) as sandbox, tempfile.TemporaryDirectory(prefix="autofit-fit-") as scratch:
        survey = {"model": model, "data": None, "trust_remote_code": of_model.trust_remote_code}
        found = ask(sandbox, "autofit.training.survey:run_survey", survey, Path(scratch))
        device = DeviceFacts.from_json(found["device"])
        source = ModelSource(model=found["model"], trust_remote_code=of_model.trust_remote_code)
        facts = ModelFacts.from_json(found["facts"])
        prepared = Prepared(
            source=source,
            model=replace(facts, attention=of_model.attention or facts.attention),
            data=DataFacts.of_equal(asked["global_batch_size"], asked["max_seq_length"]),
            device=device,
            notes=(),
        )
        space, budget = search_space(config, prepared)
        space = _of_stock(space, step)
        study = TrialStudy(Path(scratch), fingerprint(prepared, budget, trial_timeout))
        fitting = Fitting(
            config=config,
            prepared=prepared,
            budget=budget,
            sandbox=sandbox,
            work=Path(scratch) / "work",
            warn=_log.warning,
        )
        outcome = fitting.search(space, study, _on_trial)
    if outcome.winner is None:
        raise NothingFits(why_nothing_fits(outcome, space, budget, device))
    chosen = outcome.winner.candidate
    return Fit(
        args=_with(args, chosen, asked["global_batch_size"], prepared.model.checkpointable_layers),
        peft_config=_with_rank(peft_config, chosen.lora_rank),
        candidate=chosen,
        outcome=outcome,
        source=source,
        device=device,
    )


def _check_card_is_free() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized() and torch.cuda.memory_allocated():
        raise UsageError("fit: this process already holds the card; call fit before loading the model")


def _released(search: Sequence[str]) -> list[str]:
    knobs = [check_knob(name) for name in ((search,) if isinstance(search, str) else search)]
    for knob in knobs:
        if knob not in LOSSY:
            raise UsageError(f"search {knob}: it moves anyway or cannot here; valid: bits, seq, rank")
    return knobs


def _of_stock(space: SearchSpace, step: str) -> SearchSpace:
    """The space of a stock trainer's step."""
    return replace(space, wish=space.wish.replace(step=step), limits=replace(space.limits, stock=True))


def _with(args: TrainingArguments, chosen: Candidate, batch: int, layers: int) -> TrainingArguments:
    """A copy of the arguments with what was chosen."""
    new: Any = copy.deepcopy(args)
    new.per_device_train_batch_size = chosen.micro_batch_size
    new.gradient_accumulation_steps = batch // chosen.micro_batch_size
    new.activation_checkpointing = chosen.checkpointed_layers > 0
    new.activation_checkpointing_kwargs = None
    if chosen.checkpointed_layers:
        every = every_n_layers(chosen.checkpointed_layers, layers)
        new.activation_checkpointing_kwargs = {"use_reentrant": False, "every_n_layers": every}
    if getattr(new, "model_init_kwargs", None) is not None:
        new.model_init_kwargs = None  # of a loaded model TRL says that it ignores them
    if getattr(new, "max_length", None) is not None:
        new.max_length = chosen.max_seq_length
    return new


def _with_rank(peft_config: LoraConfig, rank: int) -> LoraConfig:
    new = copy.deepcopy(peft_config)
    new.r = rank
    return new


def _on_trial(event: TrialEvent) -> None:
    if event.result is not None:
        _log.info("trial %d: %s, %s", event.number + 1, event.result.status.value, event.candidate.to_json())
