"""What recovery costs where nothing goes wrong: AutoFitTrainer beside transformers' Trainer.

    python benchmarks/recovery_overhead.py --out benchmarks/results/recovery_overhead.json

The same training of a small Llama on one CPU thread, in turns; the CPU time of a step, and the difference as a share of
a step of 100 ms. Exit code 5 where that is more than 1 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from autofit import AutoFitTrainer
from autofit.training.workspace import environment

ROUNDS, STEPS = 8, 60
STEP_SECONDS, BOUND = 0.1, 0.01


def step_seconds(cls: type[Trainer]) -> float:
    """CPU seconds of one optimizer step of two micro-batches."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    rows = [{"input_ids": list(range(i, i + 48)), "labels": list(range(i, i + 48))} for i in range(64)]
    trainer = cls(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=STEPS,
            report_to="none",
            save_strategy="no",
            logging_steps=10,
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows,
    )
    begun = time.process_time()
    trainer.train()
    return (time.process_time() - begun) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()
    step_seconds(AutoFitTrainer)  # warm
    pairs = [(step_seconds(Trainer), step_seconds(AutoFitTrainer)) for _ in range(ROUNDS)]
    stock, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
    extra = statistics.median(b - a for a, b in pairs)
    found = {
        "stock_step_seconds": stock,
        "autofit_step_seconds": ours,
        "extra_seconds": extra,
        "share_of_100_ms": extra / STEP_SECONDS,
        "pairs": pairs,
        "environment": environment(),
    }
    print(
        f"a step: {1e3 * stock:.2f} ms stock, {1e3 * extra:+.2f} ms with recovery: {extra / STEP_SECONDS:.2%} of 100 ms"
    )
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(5 if extra / STEP_SECONDS > BOUND else 0)


if __name__ == "__main__":
    main()
