"""What recovery costs where nothing goes wrong: AutoFitTrainer beside transformers' Trainer.

    python benchmarks/recovery_overhead.py --out benchmarks/results/recovery_overhead.json

The same trainings of two small models on one CPU thread, in turns: a Llama of 4 layers, and linears, of which there are
as many, trained and frozen, as an 8B with adapters has tensors. Models and sequences are tiny, so that the difference
is not lost in what varies: it depends on how many tensors and modules there are, not on what they compute. The CPU time
of a step (the median of one training, from one's end to the next one's), and the difference as a share of a step of
100 ms: the median, where trainings are compared from the fastest of each class to the slowest, for a machine makes some
of them slow. Exit code 5 where that is more than 1 %.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from autofit import AutoFitTrainer
from autofit.training.workspace import environment

ROUNDS, STEPS, WARM, LENGTH = 24, 100, 5, 16
STEP_SECONDS, BOUND = 0.1, 0.01
# Of Llama-3-8B with LoRA on all linears: its own tensors, and those of the adapters.
FROZEN, TRAINED = 291, 448


def llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    return LlamaForCausalLM(config)


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(FROZEN + TRAINED))
        for linear in self.linears[:FROZEN]:
            linear.requires_grad_(False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": input_ids.sum() * torch.cat([linear.weight for linear in self.linears]).sum()}


MODELS: dict[str, Callable[[], nn.Module]] = {"Llama of 4 layers": llama, "739 tensors": Linears}


class Ends(TrainerCallback):
    """When steps end, in CPU time."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time())


def step_seconds(cls: type[Trainer], model: nn.Module) -> float:
    """CPU seconds of one optimizer step of two micro-batches, the median of a training's."""
    ends = Ends()
    rows = [{"input_ids": list(range(i, i + LENGTH)), "labels": list(range(i, i + LENGTH))} for i in range(64)]
    trainer = cls(
        model=model,
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
        callbacks=[ends],
    )
    trainer.train()
    return statistics.median(b - a for a, b in itertools.pairwise(ends.seconds[WARM:]))


def compared(make: Callable[[], nn.Module]) -> dict[str, Any]:
    """Both classes in turns."""

    def one(cls: type[Trainer]) -> float:
        torch.manual_seed(0)
        return step_seconds(cls, make())

    one(AutoFitTrainer)  # warm
    pairs = [(one(Trainer), one(AutoFitTrainer)) for _ in range(ROUNDS)]
    stock, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
    extra = statistics.median(b - a for a, b in zip(*map(sorted, zip(*pairs, strict=True)), strict=True))
    return {
        "stock_step_seconds": stock,
        "autofit_step_seconds": ours,
        "extra_seconds": extra,
        "share_of_100_ms": extra / STEP_SECONDS,
        "pairs": pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()
    found = {}
    for name, make in MODELS.items():
        found[name] = one = compared(make)
        print(
            f"{name}: a step of {1e3 * one['stock_step_seconds']:.2f} ms, {1e3 * one['extra_seconds']:+.2f} ms with "
            f"recovery: {one['share_of_100_ms']:.2%} of 100 ms"
        )
    asked.out.write_text(json.dumps({**found, "environment": environment()}, indent=1) + "\n", encoding="utf-8")
    sys.exit(5 if any(one["share_of_100_ms"] > BOUND for one in found.values()) else 0)


if __name__ == "__main__":
    main()
