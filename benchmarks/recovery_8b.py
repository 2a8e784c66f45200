"""Llama-3-8B in 4 bits under AutoFitTrainer on a capped card: a long example late, and a neighbour that takes memory.

    python benchmarks/recovery_8b.py --cap 24GB --out benchmarks/results/recovery_8b-h100.json

Four runs of six optimizer steps of 16 sequences, random weights, all layers checkpointed, stock loss: each kind of data
once with the whole card and once capped. Kept of each: steps, losses, the order in which sequences were collated, the
peak, and what recovery did.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from autofit import AutoFitTrainer
from autofit.memory.device import detect_device
from autofit.space.candidate import Candidate
from autofit.space.source import ModelSource
from autofit.space.units import parse_bytes
from autofit.step.model import build_model
from autofit.step.policy import resolve_policy
from autofit.training.workspace import environment

LENGTHS = [300, 120, 900, 2000, 450, 60, 700, 1500, 220, 380, 510, 90, 1200, 640, 330, 180]
LONG_AT, LONG = 70, 8192
RUNS = {
    "whole card": (False, False),
    "capped, with a neighbour in steps 3 and 4": (True, False),
    "whole card, one example of 8,192 tokens": (False, True),
    "capped, one example of 8,192 tokens": (True, True),
}
CANDIDATE = Candidate(micro_batch_size=4, max_seq_length=2048, quantization_bits=4, checkpointed_layers=32, loss="full")


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Right-padded rows."""
    ids = torch.zeros((len(rows), max(len(row["input_ids"]) for row in rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[i, : len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Neighbour(TrainerCallback):
    """Takes 60 % of what the cap leaves, from the beginning of step 3 to that of step 5."""

    def __init__(self, cap_bytes: int) -> None:
        self.cap_bytes = cap_bytes
        self.held: torch.Tensor | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            torch.cuda.empty_cache()
            room = self.cap_bytes - torch.cuda.memory_reserved()
            self.held = torch.empty(int(0.6 * room), dtype=torch.uint8, device="cuda")
        elif state.global_step == 4:
            self.held = None


def train(cap_bytes: int | None, long: bool) -> dict[str, Any]:
    """One run; what is kept of it."""
    draw = torch.Generator().manual_seed(1)
    data = [{"input_ids": torch.randint(1, 100_000, (n,), generator=draw).tolist()} for n in LENGTHS * 6]
    if long:
        data[LONG_AT] = {"input_ids": torch.randint(1, 100_000, (LONG,), generator=draw).tolist()}
    source, policy = ModelSource(model="llama-3-8b", random_weights=True), resolve_policy(CANDIDATE, detect_device())
    order = hashlib.sha256()

    def noted(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        order.update(json.dumps(rows).encode())
        return collate(rows)

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_steps=6,
        learning_rate=1e-4,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=True,
    )
    trainer = AutoFitTrainer(
        model=build_model(CANDIDATE, source, policy, 32, 0),
        args=arguments,
        train_dataset=data,
        data_collator=noted,
        callbacks=[Neighbour(cap_bytes)] if cap_bytes and not long else [],
    )
    if cap_bytes:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap_bytes / total)
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    trainer.train()
    return {
        "steps": trainer.state.global_step,
        "losses": [round(line["loss"], 4) for line in trainer.state.log_history if "loss" in line],
        "order_sha256": order.hexdigest(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "seconds": round(time.perf_counter() - begun, 1),
        "events": trainer.recovery.events,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cap", default="24GB", help="of PyTorch's allocator; default: %(default)s")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=RUNS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.only:
        capped, long = RUNS[asked.only]
        asked.out.write_text(json.dumps(train(parse_bytes(asked.cap) if capped else None, long)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in RUNS:  # a process each: none inherits another's memory
            part = Path(scratch) / "run.json"
            command = [sys.executable, __file__, "--cap", asked.cap, "--out", str(part), "--only", name]
            subprocess.run(command, check=True)
            found[name] = json.loads(part.read_text())
            line = {k: v for k, v in found[name].items() if k not in ("events", "order_sha256")}
            print(f"{name}: {line}, {len(found[name]['events'])} events")
    device = detect_device()
    document = {"cap": asked.cap, "device": device.to_json(), "environment": environment(), "runs": found}
    asked.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
