"""One long example late in an epoch, and too little memory for it: what each tool makes of the same training.

    python benchmarks/recovery.py --out benchmarks/results/recovery.json

A tiny Llama on the CPU, 64 sequences, 8 on the device and 2 such micro-batches a step, two epochs: 8 steps of 16. A
ledger of live tensors stands for the card: it raises torch.OutOfMemoryError at the operation that crosses the limit,
which every step fits but the one with the long example. Kept of each tool: whether it ended, its optimizer steps, how
many sequences each had, how often each sequence was trained in the weights that survived, the learning rates, and how
far the weights are from the undisturbed run's, as a share of the way those went. Lightning is not among this project's
dependencies (`pip install lightning`); it is left out where it is missing.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import multiprocessing
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from recovery_8b import collate
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from autofit import AutoFitTrainer
from autofit.memory.ledger import Ledger
from autofit.training.workspace import environment

SEQUENCES, BATCH, ACCUMULATION, EPOCHS, SEED = 64, 8, 2, 2, 11
LONG_AT, LONG = 17, 200
LEARNING_RATE = 1e-3
LIGHTNING = "Lightning's batch-size finder"


def sequences() -> list[dict[str, list[int]]]:
    """A sequence's first token is its number."""
    draw = torch.Generator().manual_seed(7)
    lengths = torch.randint(20, 40, (SEQUENCES,), generator=draw).tolist()
    lengths[LONG_AT] = LONG
    return [
        {"input_ids": [i, *torch.randint(100, 512, (n - 1,), generator=draw).tolist()]} for i, n in enumerate(lengths)
    ]


def fresh_model() -> LlamaForCausalLM:
    set_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=512,
            max_position_embeddings=256,
        )
    )


class Card(Ledger):
    """The ledger in a card's words: that is how some tools know an out-of-memory."""

    def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__torch_dispatch__(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(f"CUDA out of memory. {error}") from None


class Kept:
    """What a training did: the sequences of each optimizer step, and its learning rates."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.rates: list[float] = []
        self.pending: list[int] = []

    def stepped(self, rate: float) -> None:
        self.steps.append(self.pending)
        self.rates.append(rate)
        self.pending = []


class KeptByTrainer(TrainerCallback):
    """Tells a `Kept` when an optimizer step is done."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.kept.pending = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kept.stepped(kwargs["optimizer"].param_groups[0]["lr"])


def trainer_of(cls: type[Trainer], model: Any, kept: Kept, batch_size: int = BATCH, **more: Any) -> Trainer:
    """The script: a Trainer of a class. What a step was given counts once it is through."""

    class Recorded(cls):  # type: ignore[valid-type, misc]
        def training_step(self, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(model, inputs, *args)
            kept.pending += inputs["input_ids"][:, 0].tolist()
            return loss

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=ACCUMULATION,
        num_train_epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=SEED,
        **more,
    )
    return Recorded(
        model=model, args=arguments, train_dataset=sequences(), data_collator=collate, callbacks=[KeptByTrainer(kept)]
    )


def by_trainer(model: Any, kept: Kept) -> Any:
    """transformers.Trainer as it is."""
    trainer_of(Trainer, model, kept).train()
    return model


def by_auto_find(model: Any, kept: Kept) -> Any:
    """The same with `auto_find_batch_size=True`."""
    trainer_of(Trainer, model, kept, auto_find_batch_size=True).train()
    return model


def by_accelerate(model: Any, kept: Kept) -> Any:
    """accelerate's decorator around the script, which makes its model anew each time, as its documentation shows."""

    @find_executable_batch_size(starting_batch_size=BATCH)
    def train(batch_size: int) -> Any:
        again = copy.deepcopy(model)
        kept.__init__()  # type: ignore[misc]  # what came before did not survive
        trainer_of(Trainer, again, kept, batch_size).train()
        return again

    return train()


def by_autofit(model: Any, kept: Kept) -> Any:
    """AutoFitTrainer."""
    trainer_of(AutoFitTrainer, model, kept).train()
    return model


def by_lightning(model: Any, kept: Kept) -> Any:
    """Lightning's batch-size finder, then its `fit`."""
    import lightning.pytorch as pl
    from lightning.pytorch.tuner import Tuner

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.batch_size, self.kept = model, BATCH, Kept()

        def train_dataloader(self) -> Any:
            order = torch.Generator().manual_seed(SEED)
            return DataLoader(sequences(), self.batch_size, shuffle=True, collate_fn=collate, generator=order)  # type: ignore[arg-type]

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            self.kept.pending += batch["input_ids"][:, 0].tolist()
            return loss

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            self.kept.stepped(self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)
            steps = EPOCHS * SEQUENCES // (BATCH * ACCUMULATION)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accumulate_grad_batches=ACCUMULATION,
        default_root_dir=tempfile.mkdtemp(),
        **quiet,  # type: ignore[arg-type]
    )
    module = Module()
    Tuner(trainer).scale_batch_size(module, init_val=BATCH)
    module.kept = kept
    trainer.fit(module)
    return model


TOOLS: dict[str, Callable[[Any, Kept], Any]] = {
    "transformers.Trainer": by_trainer,
    "its auto_find_batch_size": by_auto_find,
    "accelerate's find_executable_batch_size": by_accelerate,
    LIGHTNING: by_lightning,
    "AutoFitTrainer": by_autofit,
}


def run(name: str, limit_bytes: int | None) -> dict[str, Any]:
    """One training in this process; its weights with what was kept."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, kept, ended = fresh_model(), Kept(), "to its end"
    before = [p.detach().clone() for p in model.parameters()]
    ledger = Card()
    ledger.hold(model.parameters())
    ledger.limit_bytes = limit_bytes
    held = ledger.live_bytes
    with ledger:
        try:
            model = TOOLS[name](model, kept)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            ended = f"{type(error).__name__} in step {len(kept.steps) + 1}"
    return {
        "ended": ended,
        "steps": kept.steps,
        "rates": kept.rates,
        "held": held,
        "peak": ledger.peak_bytes,
        "before": before,
        "after": [p.detach().clone() for p in model.parameters()],
    }


def in_a_child(name: str, limit_bytes: int | None) -> dict[str, Any]:
    """`run` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run, (name, limit_bytes))


def compared(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """What a training kept of the undisturbed one."""
    times = Counter(i for step in found["steps"] for i in step)
    way = sum(float((a - b).norm() ** 2) for a, b in zip(reference["after"], reference["before"], strict=True)) ** 0.5
    off = sum(float((a - b).norm() ** 2) for a, b in zip(found["after"], reference["after"], strict=True)) ** 0.5
    return {
        "ended": found["ended"],
        "optimizer_steps": len(found["steps"]),
        "sequences_of_a_step": sorted({len(step) for step in found["steps"]}, reverse=True),
        "trained_once_an_epoch": sum(times[i] == EPOCHS for i in range(SEQUENCES)),
        "same_order": found["steps"] == reference["steps"],
        "same_learning_rates": found["rates"] == reference["rates"],
        "weights_off": off / way,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The README's table."""
    lines = [
        "| | ends | steps | sequences of a step | of 64, once an epoch | order kept | rates kept | weights off |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        sizes = ", ".join(map(str, row["sequences_of_a_step"]))
        same = ("yes" if row[key] else "no" for key in ("same_order", "same_learning_rates"))
        cells = [row["ended"], row["optimizer_steps"], sizes, row["trained_once_an_epoch"], *same]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} | {row['weights_off']:.1g} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    reference = in_a_child("transformers.Trainer", None)
    limit = reference["held"] + int(0.6 * (reference["peak"] - reference["held"]))
    rows = {"undisturbed": compared(reference, reference)}
    for name in TOOLS:
        try:
            rows[name] = compared(in_a_child(name, limit), reference)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    print(table(rows))
    versions = {"lightning": importlib.metadata.version("lightning")} if LIGHTNING in rows else {}
    document = {"limit_bytes": limit, "tools": rows, "environment": {**environment(), **versions}}
    asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
