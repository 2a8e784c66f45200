"""The search from a script: the arguments that it returns train within the budget, and keep what the script set."""

import contextlib

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainingArguments
from trl import SFTConfig

import autofit
from autofit.errors import NothingFits, UsageError
from autofit.space.candidate import Candidate
from autofit.space.ladder import Limits, knob_values
from autofit.training import fit as fitting
from autofit.training.fit import fit
from autofit.training.recovery import trainers
from autofit.training.recovery.trainers import AutoFitSFTTrainer

LORA = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
BUDGET = "20500KB"
TEXTS = Dataset.from_list([{"text": "hello world " * 10}] * 24)


@pytest.fixture
def shared(sandbox, monkeypatch):
    """The tests' sandbox in the place of one of its own."""
    monkeypatch.setattr(fitting, "Sandbox", lambda preload: contextlib.nullcontext(sandbox))


def arguments(folder, kind=SFTConfig, **more):
    values = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "report_to": "none"}
    values |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    values |= {"max_length": 96} if kind is SFTConfig else {}
    return kind(output_dir=str(folder), **{**values, **more})


@pytest.fixture(scope="module")
def found(sandbox, tiny_model, tmp_path_factory):
    args = arguments(tmp_path_factory.mktemp("fit"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "Sandbox", lambda preload: contextlib.nullcontext(sandbox))
        made = fit(str(tiny_model), train_dataset=TEXTS, args=args, peft_config=LORA, gpu_mem=BUDGET)
    assert args.per_device_train_batch_size == 2  # the script's are left alone
    return made


def test_what_it_returns_keeps_the_script_s_batch_and_trains_within_the_budget(found):
    assert found.args.per_device_train_batch_size * found.args.gradient_accumulation_steps == 4
    assert found.args.per_device_train_batch_size < 4
    assert found.args.max_length == 96
    assert found.peft_config.r == 8
    assert found.candidate.step == "sft"
    trainer = AutoFitSFTTrainer(
        model=found.load_model(),
        args=found.args,
        peft_config=found.peft_config,
        train_dataset=TEXTS,
        gpu_mem=BUDGET,
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.recovery.events == []


def test_a_model_by_name_with_a_budget_is_fitted_in_the_constructor(found, monkeypatch, tiny_model, tmp_path):
    asked = {}
    monkeypatch.setattr(trainers, "fit", lambda model, **given: asked.update(model=model, **given) or found)
    args = arguments(tmp_path)
    trainer = AutoFitSFTTrainer(str(tiny_model), args, peft_config=LORA, train_dataset=TEXTS, gpu_mem=BUDGET)
    assert asked == {
        "model": str(tiny_model),
        "train_dataset": TEXTS,
        "args": args,
        "peft_config": LORA,
        "gpu_mem": BUDGET,
    }
    assert trainer.args.per_device_train_batch_size == found.args.per_device_train_batch_size
    with pytest.raises(UsageError, match="needs peft_config and train_dataset"):
        AutoFitSFTTrainer(str(tiny_model), args, train_dataset=TEXTS, gpu_mem=BUDGET)


def test_what_changes_the_result_moves_only_where_it_is_released(shared, tiny_model, tmp_path):
    tokens = Dataset.from_list([{"input_ids": list(range(1, 200))}] * 4)
    args = arguments(tmp_path, max_length=192, per_device_train_batch_size=1, gradient_accumulation_steps=1)
    with pytest.raises(NothingFits, match=r"nothing fits 20\.0 MB"):
        fit(str(tiny_model), train_dataset=tokens, args=args, peft_config=LORA, gpu_mem="20MB")
    found = fit(str(tiny_model), train_dataset=tokens, args=args, peft_config=LORA, gpu_mem="20MB", search=("seq",))
    assert found.args.max_length == found.candidate.max_seq_length < 192


def test_stock_trainers_have_equal_micro_batches_and_every_n_th_layer_checkpointed():
    wish = Candidate(micro_batch_size=12, max_seq_length=64)
    limits = Limits(global_batch_size=12, checkpointable_layers=32, can_page=True, stock=True)
    assert knob_values("micro_batch_size", wish, limits) == [12, 6, 4, 3, 2, 1]
    assert knob_values("checkpointed_layers", wish, limits) == [0, 4, 8, 11, 16, 32]


@pytest.mark.parametrize(
    ("args", "lora", "more", "message"),
    [
        ({}, LORA, {"search": ("batch",)}, "search micro_batch_size: it moves anyway"),
        ({}, LORA, {"search": ("bots",)}, "'bots' is not a knob"),
        ({"optim": "adafactor"}, LORA, {}, "optim adafactor cannot be estimated; valid: adamw_torch_fused"),
        ({}, LoraConfig(r=8), {}, "peft_config names no target_modules"),
        ({"max_length": None}, LORA, {}, "set max_length, or give a tokenized dataset"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path, args, lora, more, message):
    with pytest.raises(UsageError, match=message):
        fit("m", train_dataset=TEXTS, args=arguments(tmp_path, **args), peft_config=lora, **more)


def test_plain_arguments_are_the_trainer_s(tmp_path):
    with pytest.raises(UsageError, match="set max_length, or give a tokenized dataset"):
        autofit.fit("m", train_dataset=TEXTS, args=arguments(tmp_path, TrainingArguments), peft_config=LORA)


def test_a_process_that_holds_the_card_is_told_so(monkeypatch, tmp_path):
    for name in ("is_available", "is_initialized", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1)
    with pytest.raises(UsageError, match="call fit before loading the model"):
        fit("m", train_dataset=TEXTS, args=arguments(tmp_path), peft_config=LORA)
