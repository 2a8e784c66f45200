"""The real stock trainers and their recipes, run under the ledger in the same way, phase by phase.

What is neutralized, and how:
- The loader's host work. Both sides get batches that were collated before, by the trainer's own collator, as copies
  made when their optimizer step begins: on a GPU that is when they come to the device. A batch that the loader
  prefetches is on the host and not counted.
- Nothing else: the optimizer's counters, the loop's scalars, the metrics and the gradients' norm count on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import datasets
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, default_data_collator
from trl import SFTConfig, SFTTrainer

from autofit.memory.ledger import Ledger
from autofit.space.candidate import Candidate
from autofit.space.source import ModelSource
from autofit.step.batch import MicroBatch, full_rows
from autofit.step.model import load_config, quantization_config
from autofit.step.optimizer import build_optimizer
from autofit.step.policy import StepPolicy
from autofit.step.step import StockStep, build_step
from autofit.step.tokenizer import byte_tokenizer

SEED = 42  # the trainers' default
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Run:
    """A model folder and how it is trained for `steps` optimizer steps of `accumulation` micro-batches."""

    folder: str
    candidate: Candidate
    accumulation: int = 1
    steps: int = 2
    mixed: bool = False
    attention: str = "sdpa"

    def policy(self, **changes: Any) -> StepPolicy:
        dtype = "bfloat16" if self.mixed else "float32"
        policy = StepPolicy(
            device="cpu",
            weight_dtype=dtype,
            autocast_dtype="bfloat16" if self.mixed else None,
            attention=self.attention,
            fused_optimizer=False,
            loss_scaling=False,
        )
        return replace(policy, **changes)

    def rows(self) -> torch.Tensor:
        """int64 [all rows, length]"""
        count = self.candidate.micro_batch_size * self.accumulation * self.steps
        return full_rows(count, self.candidate.max_seq_length, 256).input_ids

    def batches(self) -> list[torch.Tensor]:
        return list(self.rows().split(self.candidate.micro_batch_size))


@dataclass
class Measured:
    """Bytes of the model, the peak of each phase in order (forward, backward of each micro-batch, optimizer), loss."""

    static_bytes: int
    peaks: list[int]
    loss: float


class PhaseLedger(Ledger):
    """Notes the peak of each phase and starts a new one."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: list[int] = []

    def begin(self, model: torch.nn.Module) -> int:
        self.hold([*model.parameters(), *model.buffers()])
        self.reset_peak()
        return self.live_bytes

    def mark(self) -> None:
        self.peaks.append(self.peak_bytes)
        self.reset_peak()


def measure_recipe(run: Run) -> Measured:
    step = build_step(run.candidate, ModelSource(model=run.folder), run.policy(), 2 * run.candidate.lora_rank, SEED)
    assert isinstance(step, StockStep)
    nothing = torch.empty(0, dtype=torch.int64)
    batches = [MicroBatch(ids, nothing, nothing) for ids in run.batches()]
    ledger = PhaseLedger()
    with ledger:
        static = ledger.begin(step.model)
        ledger._ignore(step.running_loss)  # a number made a tensor, as in the real class
        optimizer = build_optimizer(step.model, run.candidate, step.policy, LEARNING_RATE)
        step.report = lambda phase: ledger.mark() if phase == "backward" else None
        losses = []
        for first in range(0, len(batches), run.accumulation):
            micro = [replace(b, input_ids=b.input_ids.clone()) for b in batches[first : first + run.accumulation]]
            losses.append(float(step.accumulate(micro, 0)))
            del micro
            step.before_optimizer(optimizer)
            ledger.mark()
            optimizer.step()
            ledger.mark()
            optimizer.zero_grad()
    return Measured(static, ledger.peaks, sum(losses) / len(losses))


def measure_real(run: Run) -> Measured:
    trainer = _sft(run) if run.candidate.step == "sft" else _trainer(run)
    collated = _collated(run, trainer)
    ledger = PhaseLedger()

    def next_batches(iterator: Any, count: int, device: Any) -> Any:
        fresh = [{name: tensor.clone() for name, tensor in next(iterator).items()} for _ in range(count)]
        return fresh, trainer._get_num_items_in_batch(fresh, device)

    backward = trainer.accelerator.backward

    def marked_backward(loss: torch.Tensor, **kwargs: Any) -> None:
        ledger.mark()
        backward(loss, **kwargs)

    trainer.get_train_dataloader = lambda: _Loader(collated, trainer.train_dataset)
    trainer.get_batch_samples = next_batches
    trainer.accelerator.backward = marked_backward
    trainer.add_callback(_Marks(ledger))
    with ledger:
        static = ledger.begin(trainer.model)
        result = trainer.train()
    return Measured(static, ledger.peaks, result.training_loss)


class _Marks(TrainerCallback):
    def __init__(self, ledger: PhaseLedger) -> None:
        self.ledger = ledger

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.ledger.mark()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.ledger.mark()


class _Loader:
    def __init__(self, batches: list[dict[str, torch.Tensor]], dataset: datasets.Dataset) -> None:
        self.batches = batches
        self.dataset = dataset

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _base(run: Run) -> Any:
    settings = quantization_config(run.candidate, load_config(ModelSource(model=run.folder)))
    base = AutoModelForCausalLM.from_pretrained(
        run.folder,
        dtype=getattr(torch, run.policy().weight_dtype),
        attn_implementation=run.attention,
        quantization_config=settings,
        device_map={"": "cpu"} if settings else None,
    )
    if run.candidate.prepare_kbit:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return base


def _lora(run: Run) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=run.candidate.lora_rank,
        lora_alpha=2 * run.candidate.lora_rank,
        lora_dropout=run.candidate.lora_dropout,
        target_modules="all-linear",
    )


def _arguments(run: Run, kind: type[TrainingArguments], num_layers: int) -> TrainingArguments:
    layers = run.candidate.checkpointed_layers
    return kind(
        output_dir=f"{run.folder}/out",
        per_device_train_batch_size=run.candidate.micro_batch_size,
        gradient_accumulation_steps=run.accumulation,
        max_steps=run.steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim=run.candidate.optimizer,
        bf16=run.mixed,
        use_cpu=True,
        gradient_checkpointing=layers > 0,
        gradient_checkpointing_kwargs={"every_n_layers": num_layers // layers} if 0 < layers < num_layers else None,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def _dataset(run: Run) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"input_ids": row, "labels": row} for row in run.rows().tolist()])


def _sft(run: Run) -> Any:
    base = _base(run)
    return SFTTrainer(
        model=base,
        args=_arguments(run, SFTConfig, base.config.num_hidden_layers),
        train_dataset=_dataset(run),
        processing_class=byte_tokenizer(),
        peft_config=_lora(run),
    )


def _trainer(run: Run) -> Any:
    base = _base(run)
    torch.manual_seed(SEED)
    model = get_peft_model(base, _lora(run))
    arguments = _arguments(run, TrainingArguments, base.config.num_hidden_layers)
    return Trainer(model=model, args=arguments, train_dataset=_dataset(run), data_collator=default_data_collator)


def _collated(run: Run, trainer: Any) -> list[dict[str, torch.Tensor]]:
    """The trainer's own collator over the run's rows; transformers' default collator takes the mask from the rows."""
    extra = {} if run.candidate.step == "sft" else {"attention_mask": [1] * run.candidate.max_seq_length}
    return [
        trainer.data_collator([{"input_ids": row, "labels": row, **extra} for row in batch.tolist()])
        for batch in run.batches()
    ]
