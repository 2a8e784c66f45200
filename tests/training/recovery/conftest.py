"""A tiny Llama and data of all lengths, stock trainers and ours on them, and faults."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from autofit.training import checkpoints
from autofit.training.recovery.trainers import AutoFitTrainer
from tests.training.recovery.forked import forked

# Two optimizer steps of two micro-batches.
ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "seed": 11,
}
# Epochs of four steps; saves after steps 2, 4 (an epoch's last), 6 and 7.
RUN = {
    "max_steps": 7,
    "per_device_train_batch_size": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
}
LENGTHS = [9, 30, 14, 22, 5, 17, 26, 11, 30, 8, 19, 24, 6, 28, 13, 21]


def pad(rows):
    width = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        ids, missing = row["input_ids"], width - len(row["input_ids"])
        batch["input_ids"].append(ids + [0] * missing)
        batch["attention_mask"].append([1] * len(ids) + [0] * missing)
        batch["labels"].append(ids + [-100] * missing)
    return {name: torch.tensor(values) for name, values in batch.items()}


def examples():
    draw = torch.Generator().manual_seed(7)
    return [{"input_ids": torch.randint(1, 64, (length,), generator=draw).tolist()} for length in LENGTHS]


@pytest.fixture(scope="session")
def tiny_llama():
    set_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=64,
            max_position_embeddings=64,
            attention_dropout=0.0,
        )
    )


@pytest.fixture
def made(tiny_llama, tmp_path):
    """Makes a trainer of a class: the same model, data and arguments each time."""

    def make(cls, model=None, **given):
        arguments = {"output_dir": str(tmp_path / f"run-{cls.__name__}"), **ARGUMENTS}
        mixed = {k: given.pop(k) for k in list(given) if k in ("train_dataset", "eval_dataset", "data_collator")}
        extra = {k: given.pop(k) for k in list(given) if k.startswith("compute_") or k in ("optimizers", "gpu_mem")}
        data = {"train_dataset": examples(), "data_collator": pad} | mixed
        return cls(
            model=copy.deepcopy(model or tiny_llama), args=TrainingArguments(**{**arguments, **given}), **data, **extra
        )

    return make


@pytest.fixture(scope="session")
def with_dropout(tiny_llama):
    """With dropout, so that random numbers matter."""
    model = copy.deepcopy(tiny_llama)
    model.model.layers[0].self_attn.attention_dropout = 0.3
    return model


@pytest.fixture
def run(made, with_dropout, tmp_path):
    """Trainings of the same run in forks: `run(folder, spoil)` trains to the end, or as far as it gets."""

    class Run:
        def __init__(self):
            self.expected = self.undisturbed()

        def undisturbed(self, **given):
            stock = made(Trainer, with_dropout, output_dir=str(tmp_path / "undisturbed"), **{**RUN, **given})
            stock.train()
            return weights(stock)

        def __call__(self, folder, spoil=None, cls=AutoFitTrainer, signals=(), **given):
            def work():
                ours = made(cls, with_dropout, output_dir=str(folder), **{**RUN, **given})
                if spoil is not None:
                    spoil(ours)
                newest = folder.is_dir() and checkpoints.recover(folder, print) is not None
                ours.train(resume_from_checkpoint=True if newest else None)
                torch.save(weights(ours), folder / "end")

            return forked(work, signals=signals)

        def goes_on(self, folder, expected=None, **given):
            """Whether the rest of the run, undisturbed, ends with the weights of the undisturbed one."""
            return self(folder, **given) == 0 and same(torch.load(folder / "end"), expected or self.expected)

    return Run()


def newest(folder):
    checkpoint = checkpoints.newest_whole(folder)
    return 0 if checkpoint is None else checkpoints.step_of(checkpoint)


class FailingAllocations(TorchDispatchMode):
    """Counts allocations of so many bytes and more; those whose turn is in `fail` run out of memory.

    Args:
        error: what is raised then, instead of torch's own.
    """

    def __init__(self, fail=(), least=1024, error=None):
        super().__init__()
        self.fail, self.least, self.error, self.count = set(fail), least, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and (size := leaf.untyped_storage().nbytes()) >= self.least:
                if leaf.untyped_storage()._cdata in inputs:
                    continue
                self.count += 1
                if self.count - 1 in self.fail:
                    raise self.error or torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
        return out


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def farthest(one, other, start):
    """The largest difference of two weights, as a share of the distance travelled from the start."""
    travelled = torch.sqrt(sum(((one[n] - start[n]).float() ** 2).sum() for n in one))
    apart = torch.sqrt(sum(((one[n] - other[n]).float() ** 2).sum() for n in one))
    return float(apart / travelled)
