"""Unequal lengths: `autofit run`, packed, beside TRL's SFTTrainer, padded, in real tokens a second.

    python benchmarks/packed_8b.py --cap 24GB --out benchmarks/results/packed_8b-h100.json

Llama-3-8B in 4 bits, random weights, rank 16 on all linears, global batch 64, log-normal lengths (median 300, at most
2,048 tokens), the same sequences for both. TRL runs with all layers checkpointed and 4, 8 and 16 rows on the device;
its best counts. Seconds are those of whole optimizer steps after the first.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from autofit.space.units import parse_bytes

GLOBAL_BATCH, STEPS, WARM = 64, 4, 1
ROWS = (4, 8, 16)
LONGEST, MEDIAN, SIGMA = 2048, 300, 1.0


def lengths() -> list[int]:
    """Tokens of each sequence of a run."""
    draw = random.Random(0)
    return [
        max(8, min(LONGEST, round(draw.lognormvariate(math.log(MEDIAN), SIGMA)))) for _ in range(GLOBAL_BATCH * STEPS)
    ]


def run_autofit(cap: str, folder: Path) -> dict[str, Any]:
    """A run of the command, as a user's."""
    draw = random.Random(1)
    with (folder / "data.jsonl").open("w") as file:
        for length in lengths():  # a byte is a token, and the end is one
            text = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=length - 1))
            file.write(json.dumps({"text": text}) + "\n")
    config = folder / "run.yaml"
    config.write_text(f"global_batch_size: {GLOBAL_BATCH}\neval_fraction: 0.0\n")
    command = [
        *(
            "run",
            str(config),
            "--model",
            "llama-3-8b",
            "--random-weights",
            "--data",
            str(folder / "data.jsonl"),
            "--gpu-mem",
            cap,
        ),
        *("--max-steps", str(STEPS), "--output-dir", str(folder / "run")),
    ]
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "autofit", *command], check=True)
    plan = json.loads((folder / "run/plan.json").read_text())
    steps = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in steps if "tokens" in line]
    seconds = steps[-1]["seconds"] - steps[WARM - 1]["seconds"]
    end = [json.loads(line) for line in (folder / "run/events.jsonl").read_text().splitlines()][-1]
    timed = steps[WARM:]
    return {
        "real_tokens_per_second": sum(line["tokens"] for line in timed) / seconds,
        "fill": sum(line["tokens"] for line in timed) / sum(line["padded_tokens"] for line in timed),
        "chosen": plan["chosen"],
        "trial": plan["measured"],
        "training": {k: v for k, v in end.items() if k.startswith("peak") or k == "device_bytes"},
        "seconds_all": time.perf_counter() - begun,
    }


def run_trl(cap: str, rows: int) -> dict[str, Any]:
    """TRL's trainer with so many rows on the device."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from autofit.memory.device import detect_device
    from autofit.space.candidate import Candidate
    from autofit.space.source import ModelSource
    from autofit.step.model import build_model
    from autofit.step.policy import resolve_policy
    from autofit.step.tokenizer import byte_tokenizer

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(parse_bytes(cap) / total)
    draw = random.Random(1)
    data = [{"input_ids": [draw.randrange(256) for _ in range(length)]} for length in lengths()]
    candidate = Candidate(
        micro_batch_size=rows, max_seq_length=LONGEST, quantization_bits=4, checkpointed_layers=32, step="sft"
    )
    source = ModelSource(model="llama-3-8b", random_weights=True)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            ends.append(time.perf_counter())

    trainer = SFTTrainer(
        model=build_model(candidate, source, resolve_policy(candidate, detect_device()), 32, 0),
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=GLOBAL_BATCH // rows,
            max_steps=STEPS,
            max_length=LONGEST,
            bf16=True,
            gradient_checkpointing=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
            seed=42,
        ),
        train_dataset=Dataset.from_list(data),
        processing_class=byte_tokenizer(),
        callbacks=[Clock()],
    )
    seen: list[tuple[int, int]] = []
    genuine = trainer.data_collator

    def noted(examples: list[Any]) -> Any:
        batch = genuine(examples)
        seen.append((sum(len(e["input_ids"]) for e in examples), batch["input_ids"].numel()))
        return batch

    trainer.data_collator = noted
    trainer.train()
    timed = seen[WARM * GLOBAL_BATCH // rows :]
    real = sum(tokens for tokens, _ in timed)
    return {
        "rows": rows,
        "real_tokens_per_second": real / (ends[-1] - ends[WARM - 1]),
        "fill": real / sum(padded for _, padded in timed),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cap", default="24GB")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rows:
        asked.out.write_text(json.dumps(run_trl(asked.cap, asked.rows)))
        return
    stock = []
    with tempfile.TemporaryDirectory() as scratch:
        ours = run_autofit(asked.cap, Path(scratch))
        print("autofit:", ours, flush=True)
        for rows in ROWS:  # a process each: none inherits another's memory
            part = Path(scratch) / "trl.json"
            command = [sys.executable, __file__, "--cap", asked.cap, "--out", str(part), "--rows", str(rows)]
            if subprocess.run(command, check=False).returncode == 0:
                stock.append(json.loads(part.read_text()))
                print("TRL:", stock[-1], flush=True)
    from autofit.memory.device import detect_device
    from autofit.training.workspace import environment

    best = max(found["real_tokens_per_second"] for found in stock)
    document = {
        "ratio_to_trl_at_its_best": ours["real_tokens_per_second"] / best,
        "cap": asked.cap,
        "autofit": ours,
        "trl": stock,
        "device": detect_device().to_json(),
        "environment": environment(),
    }
    print("ratio:", document["ratio_to_trl_at_its_best"])
    asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
