"""Llama-3-8B in 4 bits, loaded, given to the trainers with `gpu_mem=`: what was foreseen, and what the steps then took.

    python benchmarks/foresight_8b.py --out benchmarks/results/foresight_8b-h100.json

Random weights, rank 16 on all linears, 8 rows of 2,048 tokens twice a step; a process for each case. Kept of each: what
the trainer said, what it estimated, what the allocator reserved at most in three optimizer steps, and what failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LENGTH, ROWS, STEPS = 2048, 8, 3
CASES = [("trainer", "24GB"), ("sft", "24GB"), ("sft", "16GB"), ("sft", "12GB"), ("trainer", "78GB")]


def train(step: str, cap: str) -> dict[str, Any]:
    """One case, in this process."""
    import torch
    from datasets import Dataset
    from transformers import TrainingArguments, default_data_collator
    from trl import SFTConfig

    from autofit import AutoFitSFTTrainer, AutoFitTrainer
    from autofit.memory.calibration import UNCALIBRATED
    from autofit.memory.device import detect_device
    from autofit.space.candidate import Candidate
    from autofit.space.source import ModelSource
    from autofit.step.model import build_model
    from autofit.step.policy import resolve_policy
    from autofit.step.tokenizer import byte_tokenizer

    candidate = Candidate(micro_batch_size=ROWS, max_seq_length=LENGTH, quantization_bits=4, step=step)
    source = ModelSource(model="llama-3-8b", random_weights=True)
    model = build_model(candidate, source, resolve_policy(candidate, detect_device()), 32, 0)
    model.config.use_cache = False
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 100_000, (2 * ROWS * STEPS, LENGTH), generator=draw).tolist()
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "bf16": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    trainer: Any
    if step == "sft":
        args = SFTConfig(
            **common, max_length=LENGTH, activation_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True}
        )
        data = Dataset.from_list([{"input_ids": row} for row in ids])
        trainer = AutoFitSFTTrainer(
            model=model, args=args, train_dataset=data, processing_class=byte_tokenizer(), gpu_mem=cap
        )
    else:
        rows = [{"input_ids": row, "attention_mask": [1] * LENGTH, "labels": row} for row in ids]
        trainer = AutoFitTrainer(
            model=model,
            args=TrainingArguments(**common),
            train_dataset=Dataset.from_list(rows),
            data_collator=default_data_collator,
            gpu_mem=cap,
        )
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    foreseen = next((event for event in trainer.recovery.events if event["event"] == "foreseen"), None)
    return {
        "step": step,
        "cap": cap,
        "foreseen": foreseen,
        "needed_less_context_bytes": foreseen and foreseen["needed_bytes"] - UNCALIBRATED.context_bytes,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "ooms": [event for event in trainer.recovery.events if event["event"] == "oom"],
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "seconds": trainer.state.log_history[-1]["train_runtime"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case is not None:
        asked.out.write_text(json.dumps(train(*CASES[asked.case])))
        return
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in range(len(CASES)):
            part = Path(scratch) / "case.json"
            command = [sys.executable, __file__, "--out", str(part), "--case", str(case)]
            if subprocess.run(command, check=False, timeout=300).returncode == 0:
                found.append(json.loads(part.read_text()))
                print(found[-1], flush=True)
    from autofit.memory.device import detect_device
    from autofit.training.workspace import environment

    document = {"cases": found, "device": detect_device().to_json(), "environment": environment()}
    asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
