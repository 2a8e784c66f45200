"""Trainers on two ranks over gloo, and what both say of a training."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainingArguments
from trl import SFTConfig

from autofit.step.tokenizer import byte_tokenizer
from tests.training.recovery.conftest import ARGUMENTS, FailingAllocations, examples, pad, weights
from tests.training.recovery.ranks.paired import together

# Two optimizer steps of two micro-batches a rank; a rank that is waited for in vain fails the test soon.
SHARED = {**ARGUMENTS, "per_device_train_batch_size": 2, "ddp_timeout": 10}
SAVED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
OF_TIME = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")


def plain(cls, model, folder, data=None, **given):
    arguments = TrainingArguments(**{**SHARED, "output_dir": str(folder / "run"), **given})
    data = data or {"train_dataset": examples(), "data_collator": pad, "eval_dataset": examples()}
    return cls(model=copy.deepcopy(model), args=arguments, **data)


def sft(cls, model, folder, **given):
    values = {"bf16": False, "remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    values |= {"output_dir": str(folder / "run"), "gradient_checkpointing": False}
    torch.manual_seed(0)
    return cls(
        model=copy.deepcopy(model),
        args=SFTConfig(**{**SHARED, **values, **given}),
        train_dataset=Dataset.from_list(examples()),
        eval_dataset=Dataset.from_list(examples()[:8]),
        data_collator=pad,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
        processing_class=byte_tokenizer(),
    )


def logged(trainer):
    return [{k: v for k, v in line.items() if k not in OF_TIME} for line in trainer.state.log_history]


def summary(trainer, start):
    return {
        "start": start,
        "weights": weights(trainer),
        "logged": logged(trainer),
        "events": trainer.recovery.events if hasattr(trainer, "recovery") else [],
    }


@pytest.fixture
def trained(tiny_llama, tmp_path):
    """Trains a class on two ranks or more, the second under `mode`; what all say of it."""

    def train(cls, mode=None, make=plain, model=None, resume=None, callback=None, before=None, ranks=2, **given):
        def work(rank):
            if before is not None:
                before()
            trainer = make(cls, model or tiny_llama, tmp_path, **given)
            if callback is not None and rank == 1:
                trainer.add_callback(callback)
            start = weights(trainer)
            if mode is None or rank != 1:
                trainer.train(resume_from_checkpoint=resume)
                return summary(trainer, start)
            entered = mode(trainer)
            with entered:
                trainer.train(resume_from_checkpoint=resume)
            return {**summary(trainer, start), **{k: getattr(entered, k, None) for k in ("count", "peak_bytes")}}

        return together(tmp_path / "ranks", work, ranks)

    return train


def said(ranks):
    assert set(ranks.codes) == {0}, "\n".join(ranks.wrote)
    return ranks.said


def counting(trainer):
    return FailingAllocations()


def failing(*numbers):
    return lambda trainer: FailingAllocations(numbers)


def did(one):
    return [event["did"] for event in one["events"] if event["event"] == "oom"]
