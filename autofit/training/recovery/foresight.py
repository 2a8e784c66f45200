"""What a trainer of a loaded model will need, estimated before its first step, so that little has to fail.

The model is a fact: its bits, adapters and length stay. What moves is how much of a micro-batch runs at once, whether
its layers recompute, from where, and whether the optimizer's states are paged.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl import SFTTrainer

from autofit.errors import UsageError
from autofit.memory.calibration import load_calibration
from autofit.search.forecast import Prediction, SandboxForecaster
from autofit.space.candidate import Candidate
from autofit.space.facts import DeviceFacts
from autofit.space.source import ModelSource
from autofit.space.units import format_bytes
from autofit.step.model import checkpointable_layers
from autofit.training.recovery.capping import weight_bytes
from autofit.training.recovery.redoing import Thrift
from autofit.training.scripts import longest_of, settings_of
from autofit.trial.sandbox import Sandbox

PRELOAD = ("autofit.trial.child", "autofit.memory.forecast")
_SECONDS = 600.0
_PAGED = {"adamw_torch": "paged_adamw_32bit", "adamw_8bit": "paged_adamw_8bit"}


@dataclass(frozen=True)
class Way:
    """How a trainer's steps may run.

    Attributes:
        rows: of its longest sequences at once.
        optimizer: paged where that is another than it asks for.
    """

    rows: int
    how: Thrift
    candidate: Candidate

    @property
    def tokens(self) -> int:
        return self.rows * self.candidate.max_seq_length


@dataclass(frozen=True)
class Foresight:
    """What was foreseen: the way to go, what it needs and of what, and what the trainer's own would have needed.

    `paged` is the optimizer with paged states that may take the place of the trainer's own; None where none may.
    """

    way: Way
    needed_bytes: int
    estimated_bytes: dict[str, int]
    asked: Way
    asked_bytes: int
    usable_bytes: int
    paged: str | None

    def said(self) -> str | None:
        """In a line; None where nothing moves."""
        over = f"{format_bytes(self.usable_bytes)} usable"
        if self.needed_bytes > self.usable_bytes:
            how = f", {', '.join(self._moves())}" if self.way != self.asked else ""
            return (
                f"estimated to need {format_bytes(self.needed_bytes)} at least{how}, of {over}: it may run out of "
                "memory; shorten the longest sequences or give more"
            )
        if self.way == self.asked:
            return None
        return (
            f"{self.asked.rows} rows of {self.asked.candidate.max_seq_length:,} tokens would need "
            f"{format_bytes(self.asked_bytes)}, of {over}; runs {', '.join(self._moves())}, estimated to need "
            f"{format_bytes(self.needed_bytes)} (same result)"
        )

    def _moves(self) -> list[str]:
        moves = [f"{self.way.rows} at a time"] if self.way.rows != self.asked.rows else []
        moves += ["all layers recomputed"] if self.way.how is not Thrift.NONE else []
        moves += ["from what is kept on the host"] if self.way.how is Thrift.OFFLOAD else []
        moves += ["optimizer states paged"] if self.way.candidate.optimizer != self.asked.candidate.optimizer else []
        return moves


def foresee(trainer: Any, device: DeviceFacts, usable_bytes: int) -> Foresight | None:
    """The fastest way that is estimated to fit, or that which needs least; None where the step cannot be estimated.

    The weights are counted as they are, the rest is estimated for the model's architecture.
    """
    model = trainer.model
    try:
        asked = _asked(trainer)
    except UsageError:
        return None
    layers = len(checkpointable_layers(model.get_base_model()))
    paged = _PAGED.get(asked.candidate.optimizer) if device.type == "cuda" and _may_page(trainer) else None
    ways = list(dict.fromkeys(_ways(asked, layers, device, paged)))
    predictions = _predicted(model, [way.candidate for way in ways], device)
    held = weight_bytes(model)
    found = {way: p for way, p in zip(ways, predictions, strict=True) if isinstance(p, Prediction)}
    needed = {way: p.device_bytes - p.model_bytes + held for way, p in found.items()}
    if asked not in needed:
        return None
    fitting = [way for way in found if needed[way] <= usable_bytes]
    speeds = {way: p.tokens_per_second or 0.0 for way, p in found.items()}
    same_states = [way for way in fitting if way.candidate.optimizer == asked.candidate.optimizer]
    # Where speeds are not known: fewer rows first, then what recomputes.
    preference = lambda way: (way == asked, speeds[way], -way.how, way.rows)  # noqa: E731
    chosen = max(same_states or fitting, key=preference, default=None)
    chosen = chosen or min(needed, key=needed.__getitem__)
    parts = dict(found[chosen].breakdown_bytes)
    parts["weights"] += held - found[chosen].model_bytes
    return Foresight(chosen, needed[chosen], parts, asked, needed[asked], usable_bytes, paged)


def _asked(trainer: Any) -> Way:
    """The step as the trainer would run it.

    Raises:
        UsageError: it is none that can be estimated.
    """
    model, args = trainer.model, trainer.args
    configs = list((getattr(model, "peft_config", None) or {}).values())
    if len(configs) != 1 or not isinstance(configs[0], LoraConfig) or configs[0].use_dora:
        raise UsageError("not one LoRA adapter on a base model")
    (lora,) = configs
    base = model.get_base_model()
    if type(base).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise UsageError(f"{type(base).__name__} is no causal language model")
    if any(p.requires_grad and "lora_" not in name for name, p in model.named_parameters()):
        raise UsageError("more than the adapter is trained")
    rows = args.per_device_train_batch_size
    values = settings_of(args, lora, longest_of(trainer.train_dataset, args))
    bits = 4 if getattr(base, "is_loaded_in_4bit", False) else 8 if getattr(base, "is_loaded_in_8bit", False) else 16
    quantization = getattr(base.config, "quantization_config", None)
    try:
        candidate = Candidate(
            micro_batch_size=rows,
            max_seq_length=values["max_seq_length"],
            quantization_bits=bits,
            double_quant=bool(getattr(quantization, "bnb_4bit_use_double_quant", False)),
            lora_rank=values["lora_rank"],
            lora_targets=tuple(values["lora_targets"]),
            lora_dropout=values["lora_dropout"],
            optimizer=values["optimizer"],
            dtype=values["dtype"] if values["dtype"] != "float32" else str(base.dtype).partition(".")[2],
            attention=getattr(base.config, "_attn_implementation", "sdpa"),
            accumulates=args.gradient_accumulation_steps > 1 or rows > 1,
            step="sft" if isinstance(trainer, SFTTrainer) else "trainer",
            prepare_kbit=bits < 16 and base.get_input_embeddings().weight.dtype is torch.float32,
            checkpointed_layers=_checkpointed(base, args),
            offload_activations=_offloaded(args),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    return Way(rows, Thrift.NONE, candidate)


def _checkpointed(base: nn.Module, args: Any) -> int:
    """How many layers recompute, once `train` has seen to it."""
    layers = checkpointable_layers(base)
    if not args.activation_checkpointing:
        return sum(layer.gradient_checkpointing for layer in layers)
    return -(-len(layers) // (args.activation_checkpointing_kwargs or {}).get("every_n_layers", 1))


def _offloaded(args: Any) -> str:
    if getattr(args, "activation_offloading", False):
        return "all"
    return "checkpoints" if (args.activation_checkpointing_kwargs or {}).get("offload", False) else "none"


def _may_page(trainer: Any) -> bool:
    """Whether the optimizer is the trainer's to make, and of one process: ranks with different ones drift apart."""
    own = trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None
    return own and trainer.args.world_size == 1


def _ways(asked: Way, layers: int, device: DeviceFacts, paged: str | None) -> Iterator[Way]:
    """The trainer's own and all leaner ones."""
    plain = asked.candidate
    forms = [(Thrift.NONE, plain)]
    if plain.offload_activations != "all":
        forms.append((Thrift.RECOMPUTE, plain.replace(checkpointed_layers=layers, offload_activations="none")))
    if device.type == "cuda" and plain.offload_activations != "all":
        forms.append((Thrift.OFFLOAD, plain.replace(checkpointed_layers=layers, offload_activations="checkpoints")))
        forms += [(how, form.replace(optimizer=paged)) for how, form in forms[-1:] if paged is not None]
    rows = asked.rows
    while rows:
        for how, form in forms:
            yield Way(rows, how, form.replace(micro_batch_size=rows))
        rows //= 2


def _predicted(model: Any, candidates: Sequence[Candidate], device: DeviceFacts) -> list[Prediction | str]:
    base = model.get_base_model()
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    calibration = load_calibration(device)
    with tempfile.TemporaryDirectory(prefix="autofit-") as folder, Sandbox(preload=PRELOAD) as sandbox:
        config.save_pretrained(f"{folder}/model")
        return SandboxForecaster(
            sandbox=sandbox,
            folder=Path(folder) / "forecast",
            source=ModelSource(model=f"{folder}/model", random_weights=True),
            device=device,
            checkpointable_layers=len(checkpointable_layers(base)),
            calibration=None if calibration is None else asdict(calibration),
            deadline_seconds=_SECONDS,
        ).predict(candidates)
