"""What training runs in its supervised child process."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, DatasetDict, load_from_disk
from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from autofit.memory.meter import Meter, open_meter
from autofit.step.data import truncate
from autofit.step.optimizer import build_optimizer
from autofit.step.policy import resolve_policy
from autofit.step.step import build_step
from autofit.step.tokenizer import pad_token_id
from autofit.training.arguments import training_arguments
from autofit.training.checkpoints import recover, step_of
from autofit.training.recovery.stopping import Stopped
from autofit.training.request import TrainingRequest
from autofit.training.trainer import StepTrainer
from autofit.trial.phases import PhaseReport


def run_training(request: dict[str, Any], report: PhaseReport) -> dict[str, Any]:
    """Trains a `TrainingRequest` to its end; returns steps, losses, peaks in bytes, and whether it was interrupted.

    SIGTERM ends it at the next step boundary, with a checkpoint.

    Raises:
        torch.OutOfMemoryError: a step did not fit after all.
        NonFiniteLoss: the loss is no number any more.
    """
    asked = TrainingRequest.from_json(request)
    with open_meter(asked.device.type, asked.cap_bytes) as meter:
        return _train(asked, report, meter)


def _train(asked: TrainingRequest, report: PhaseReport, meter: Meter) -> dict[str, Any]:
    report("build")
    output_dir = Path(asked.output_dir)
    policy = resolve_policy(asked.candidate, asked.device)
    step = build_step(asked.candidate, asked.source, policy, asked.lora_alpha, asked.schedule.seed)
    meter.hold([*step.model.parameters(), *step.model.buffers()])
    meter.settle()
    tokenizer = AutoTokenizer.from_pretrained(asked.tokenizer_dir)
    data = {name: truncate(split, asked.candidate.max_seq_length) for name, split in _splits(asked.data_dir).items()}
    schedule = asked.schedule
    optimizer = build_optimizer(step.model, asked.candidate, policy, schedule.learning_rate, schedule.weight_decay)
    record = RunRecord(output_dir, report, meter)
    trainer = StepTrainer(
        step,
        asked.candidate,
        pad_token_id(tokenizer),
        training_arguments(schedule, output_dir, asked.device.type, len(data["eval"]) if schedule.evaluate else 0),
        train_dataset=data["train"],
        eval_dataset=data["eval"] if schedule.evaluate else None,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=[record],
    )
    trainer.recovery.estimated_bytes = asked.estimated_bytes
    meter.reset_peak()
    steps, done = _run(trainer, record, output_dir)
    peaks = meter.peaks()
    report("save")
    if done:
        step.model.save_pretrained(str(output_dir / "adapter"))
        tokenizer.save_pretrained(output_dir / "adapter")
    losses, evaluated = record.losses("loss"), record.losses("eval_loss")
    return {
        "interrupted": not done,
        "steps": steps,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "first_eval_loss": evaluated[0] if evaluated else None,
        "last_eval_loss": evaluated[-1] if evaluated else None,
        "tokens": record.total("tokens"),
        "padded_tokens": record.total("padded_tokens"),
        "peak_allocated_bytes": peaks.allocated_bytes,
        "peak_reserved_bytes": peaks.reserved_bytes,
        "device_bytes": peaks.device_bytes,
        "recovered": sum(event["event"] == "oom" for event in trainer.recovery.events),
    }


def _splits(folder: str) -> dict[str, Dataset]:
    return {str(name): split for name, split in cast(DatasetDict, load_from_disk(folder)).items()}


def _run(trainer: StepTrainer, record: RunRecord, output_dir: Path) -> tuple[int, bool]:
    """Trains from the newest whole checkpoint, if there is one; returns steps done and whether those are all."""
    newest = recover(output_dir, trainer._warn_of_checkpoint)
    record.forget_after(0 if newest is None else step_of(newest))
    try:
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    except Stopped:
        return trainer.state.global_step, False
    return trainer.state.global_step, trainer.state.global_step >= trainer.state.max_steps


class RunRecord(TrainerCallback):
    """Writes metrics.jsonl, tells the phase, and measures the context."""

    def __init__(self, output_dir: Path, report: PhaseReport, meter: Meter) -> None:
        self.file = output_dir / "metrics.jsonl"
        self.report: Callable[..., None] = report
        self.meter = meter
        self.measured = False
        self.started = time.time()

    def losses(self, name: str) -> list[float]:
        """Every `loss` or `eval_loss` on record, those before a resume included."""
        return [line[name] for line in self._lines() if name in line]

    def total(self, name: str) -> int:
        """The sum of a figure over all steps on record, those before a resume included."""
        return sum(line.get(name, 0) for line in self._lines())

    def forget_after(self, step: int) -> None:
        """Drops what a process that was killed had recorded beyond the checkpoint that the run goes on from."""
        kept = [json.dumps(line) + "\n" for line in self._lines() if line["step"] <= step]
        if self.file.is_file():
            self.file.write_text("".join(kept), encoding="utf-8")

    def _lines(self) -> list[dict[str, Any]]:
        lines = []
        for text in self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else ():
            with contextlib.suppress(ValueError):  # the last line, torn by a kill
                lines.append(json.loads(text))
        return lines

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # As in the trial: kernels are loaded by now, and no optimizer state is paged out yet.
        if not self.measured:
            self.meter.measure_context()
            self.measured = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.report("eval")  # a sign of life; the step's phase comes again with the figures

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        line = {"step": state.global_step, "seconds": round(time.time() - self.started, 3), **(logs or {})}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.report("train", step=state.global_step, max_steps=state.max_steps, **(logs or {}))
