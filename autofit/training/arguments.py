"""The Trainer's arguments for a run. What the builder and the step decide is switched off here."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import TrainingArguments

from autofit.training.request import Schedule


def training_arguments(
    schedule: Schedule, output_dir: Path, device: str, num_eval_examples: int = 0
) -> TrainingArguments:
    """One Trainer batch is one global batch; no mixed precision, no checkpointing, no reporting of its own."""
    # accelerate would read this and wrap the model's forward in an autocast of its own.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    return TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=schedule.global_batch_size,
        # All at once, and cut like any other batch: the Trainer would average the means of unequal batches.
        per_device_eval_batch_size=max(1, num_eval_examples),
        gradient_accumulation_steps=1,
        num_train_epochs=schedule.num_train_epochs,
        max_steps=schedule.max_steps,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type=schedule.lr_scheduler_type,
        warmup_steps=schedule.warmup_steps,
        weight_decay=schedule.weight_decay,
        max_grad_norm=schedule.max_grad_norm,
        save_strategy="steps",
        save_steps=schedule.save_steps,
        save_total_limit=2,
        eval_strategy="epoch" if schedule.evaluate else "no",
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would wait for the device at every step, and hide what must stop the run
        report_to=[],
        seed=schedule.seed,
        use_cpu=device == "cpu",
        bf16=False,
        fp16=False,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
