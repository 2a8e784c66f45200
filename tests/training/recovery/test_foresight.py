"""A loaded model under a budget: its first step already runs in a way that fits, and nothing else about it changes."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.training_args import OptimizerNames
from trl import SFTConfig, SFTTrainer

from autofit.errors import UsageError
from autofit.memory.device import cpu_facts
from autofit.memory.ledger import Ledger
from autofit.training.recovery import foresight, redoing
from autofit.training.recovery.redoing import Thrift
from autofit.training.recovery.trainers import AutoFitSFTTrainer, AutoFitTrainer
from tests.training.recovery.conftest import ARGUMENTS, RUN, examples, farthest, pad, same, weights

LENGTHS = (90, 96, 96, 70, 96, 88, 96, 60)
ROWS = Dataset.from_list([{"input_ids": [(7 * i + j) % 250 for j in range(n)]} for i, n in enumerate(LENGTHS)])
LORA = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
SMALL = {"max_steps": 2, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 8}


@pytest.fixture(autouse=True)
def shared(sandbox, monkeypatch):
    """The tests' sandbox in the place of one of its own."""
    monkeypatch.setattr(foresight, "Sandbox", lambda preload: contextlib.nullcontext(sandbox))


@pytest.fixture
def adapted(tiny_model, tmp_path):
    """Makes a trainer of a class around the same adapted model."""

    def make(cls, model=None, rows=ROWS, **given):
        torch.manual_seed(3)
        if model is None:
            base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
            model = get_peft_model(base, LORA)
        budget = {"gpu_mem": given.pop("gpu_mem")} if "gpu_mem" in given else {}
        arguments = {**ARGUMENTS, **SMALL, "output_dir": str(tmp_path / cls.__name__), **given}
        if issubclass(cls, SFTTrainer):
            args = SFTConfig(**arguments, max_length=96, bf16=False)
            return cls(model=model, args=args, train_dataset=rows, **budget)
        args = TrainingArguments(**arguments)
        return cls(model=model, args=args, train_dataset=rows, data_collator=pad, **budget)

    return make


def peak_of(trainer):
    with Ledger() as ledger:
        ledger.hold([*trainer.model.parameters(), *trainer.model.buffers()])
        trainer.train()
    return ledger.peak_bytes


@pytest.mark.parametrize(("stock", "ours"), [(Trainer, AutoFitTrainer), (SFTTrainer, AutoFitSFTTrainer)])
@pytest.mark.parametrize("share", [1.02, 0.7, 0.4])
def test_no_step_has_to_fail(adapted, stock, ours, share):
    undisturbed = adapted(stock)
    start = weights(undisturbed)
    peak = peak_of(undisturbed)
    made = adapted(ours, gpu_mem=f"{int(peak * share)}B")
    made.train()
    kinds = [event["event"] for event in made.recovery.events]
    assert "oom" not in kinds
    assert ("foreseen" in kinds) is (share < 1)
    assert farthest(weights(undisturbed), weights(made), start) < 1e-4
    if share == 0.7:
        assert made._planned_tokens == 4 * 96
        assert made.recovery.events[0]["said"].startswith("8 rows of 96 tokens would need ")


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_the_notebook_in_four_bits_has_to_fail_no_step_either(adapted, tiny_model, share):
    def quantized():
        torch.manual_seed(3)
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        base = AutoModelForCausalLM.from_pretrained(
            tiny_model, quantization_config=settings, device_map="auto", dtype=torch.float32
        )
        return get_peft_model(prepare_model_for_kbit_training(base), LORA)

    undisturbed = adapted(Trainer, quantized())
    start = weights(undisturbed)
    peak = peak_of(undisturbed)
    made = adapted(AutoFitTrainer, quantized(), gpu_mem=f"{int(peak * share)}B")
    made.train()
    assert [event["event"] for event in made.recovery.events] == ["foreseen", "loss"]
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    only = [{name: of[name] for name in trained} for of in (weights(undisturbed), weights(made), start)]
    assert farthest(*only) < 1e-4


def test_the_estimate_is_of_this_model_s_weights(adapted):
    full = Dataset.from_list([ROWS[1]] * 8)  # rows that need padding need a mask, too
    peak = peak_of(adapted(AutoFitTrainer, rows=full))
    made = adapted(AutoFitTrainer, rows=full)
    answer = foresight.foresee(made, cpu_facts(), peak)
    assert answer.asked_bytes == pytest.approx(peak, rel=0.02)
    made.model.register_buffer("ballast", torch.zeros(10**6))
    assert foresight.foresee(made, cpu_facts(), peak).asked_bytes == answer.asked_bytes + 4 * 10**6


def test_where_nothing_is_estimated_to_fit_that_is_said_beforehand(adapted):
    made = adapted(AutoFitTrainer)
    held = sum(p.nbytes for p in made.model.parameters())
    hopeless = adapted(AutoFitTrainer, gpu_mem=f"{int(held * 1.2)}B")
    (event,) = hopeless.recovery.events
    assert event["event"] == "foreseen"
    assert " at least, 1 at a time, all layers recomputed, of " in event["said"]
    assert "it may run out of memory; shorten the longest sequences or give more" in event["said"]
    assert hopeless._planned_frugal.how is Thrift.RECOMPUTE


def test_what_was_planned_is_where_growing_back_ends(adapted, monkeypatch):
    made = adapted(AutoFitTrainer)
    made._plan(4 * 96, Thrift.NONE)
    made._most_tokens = 96
    monkeypatch.setattr(redoing, "QUIET_STEPS", 1)
    made.args.max_steps = 5
    made.train()
    grown = [event["most_tokens"] for event in made.recovery.events if event["event"] == "grow"]
    assert grown == [2 * 96, 4 * 96]


def test_a_model_that_cannot_be_estimated_is_only_held_to_its_budget(tiny_model, adapted):
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    made = adapted(AutoFitTrainer, base, gpu_mem="1GB")
    assert made.recovery.events == []
    assert foresight.foresee(made, cpu_facts(), 10**9) is None


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (AutoModelForCausalLM, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        (AutoModelForCausalLM, IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])),
        (AutoModelForCausalLM, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])),
        (AutoModelForSequenceClassification, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])),
    ],
    ids=["prompt", "ia3", "saved head", "classifier"],
)
def test_what_would_be_estimated_as_another_goes_without(tiny_model, adapted, kind, settings):
    model = get_peft_model(kind.from_pretrained(tiny_model, dtype=torch.float32), settings)
    assert foresight.foresee(adapted(AutoFitTrainer, model), cpu_facts(), 10**6) is None


def test_an_estimate_that_fails_keeps_no_trainer_from_being_made(adapted):
    assert adapted(AutoFitTrainer, rows=Dataset.from_dict({"input_ids": []}), gpu_mem="1GB").recovery.events == []


def test_only_the_trainer_s_own_optimizer_of_one_process_is_paged(adapted, monkeypatch):
    made = adapted(AutoFitTrainer)
    assert foresight._may_page(made)
    with monkeypatch.context() as several:
        several.setattr(TrainingArguments, "world_size", 2)
        assert not foresight._may_page(made)
    made.create_optimizer()
    assert not foresight._may_page(made)


def test_a_run_goes_on_with_the_optimizer_whose_states_its_checkpoint_has(made, tmp_path):
    """Another kind of states stands in for paged ones, which need a GPU: what is foreseen here is another optimizer."""
    mine, other = OptimizerNames.ADAMW_TORCH_FUSED, OptimizerNames.RMSPROP

    def trainer(optim, foresees=True, **given):
        ours = made(AutoFitTrainer, optim=mine, **{**RUN, "max_steps": 4, **given})
        if foresees:
            ours._optimizers, ours._optim = (mine, other), optim
        return ours

    for first, second in ((mine, other), (other, mine)):
        folder = str(tmp_path / first)
        whole = trainer(first)
        whole.train()
        trainer(first, output_dir=folder).train()
        again = trainer(second, output_dir=folder)
        again.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
        assert same(weights(again), weights(whole))
        assert again.args.optim == mine
    with pytest.raises(UsageError, match="optim was 'rmsprop' and is 'adamw_torch_fused'"):
        trainer(None, foresees=False, output_dir=folder).train(resume_from_checkpoint=True)


def test_a_model_that_is_made_anew_leaves_the_first_one_to_go(tiny_llama, tmp_path):
    made = []

    def model_init():
        made.append(weakref.ref(model := copy.deepcopy(tiny_llama)))
        return model

    args = TrainingArguments(**{**ARGUMENTS, "output_dir": str(tmp_path)})
    ours = AutoFitTrainer(model_init=model_init, args=args, train_dataset=examples(), data_collator=pad, gpu_mem="1GB")
    alive = []
    ours.add_callback(AtTheEnd(lambda: (gc.collect(), alive.append([one() is not None for one in made]))))
    ours.train()
    assert alive[-1] == [False, True]


class AtTheEnd(TrainerCallback):
    def __init__(self, work):
        self.work = work

    def on_train_end(self, args, state, control, **kwargs):
        self.work()
