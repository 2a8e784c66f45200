"""A model by name under a budget, and optimizer states that one budget pages and another does not."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from autofit.space.models import known_model
from autofit.step.tokenizer import byte_tokenizer
from autofit.training.recovery.faults import free_memory
from autofit.training.recovery.trainers import AutoFitSFTTrainer, AutoFitTrainer
from tests.gpu.test_recovery import pad
from tests.training.recovery.conftest import farthest, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

LORA = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
COMMON = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "bf16": True}


@pytest.fixture(scope="module")
def llama_1b(tmp_path_factory):
    """A Llama 3.2 1B of random weights, on disk."""
    folder = tmp_path_factory.mktemp("llama")
    config = AutoConfig.for_model(**known_model("llama-3.2-1b"))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


def test_a_model_by_name_is_fitted_loaded_and_trained_within_the_budget(llama_1b, tmp_path):
    draw = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(1, 250, (1024,), generator=draw).tolist()} for _ in range(64)]
    args = SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        max_length=1024,
        max_steps=3,
        save_strategy="no",
        activation_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **COMMON,
    )
    free_memory()
    assert torch.cuda.memory_allocated() == 0  # or `fit` refuses
    trainer = AutoFitSFTTrainer(
        str(llama_1b), args, peft_config=LORA, train_dataset=Dataset.from_list(rows), gpu_mem="8GB"
    )
    chosen = trainer.args
    assert chosen.per_device_train_batch_size * chosen.gradient_accumulation_steps == 16
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    print("rows", chosen.per_device_train_batch_size, "checkpointed", chosen.activation_checkpointing_kwargs)
    print("reserved", torch.cuda.max_memory_reserved())
    assert trainer.state.global_step == 3
    assert trainer.recovery.events == []
    assert torch.cuda.max_memory_reserved() < 8e9


SCRIPT, PAGED = OptimizerNames.ADAMW_TORCH_FUSED, OptimizerNames.PAGED_ADAMW
SCRIPT_8BIT, PAGED_8BIT = OptimizerNames.ADAMW_8BIT, OptimizerNames.PAGED_ADAMW_8BIT


@pytest.mark.parametrize(
    ("kept", "foreseen"),
    [(SCRIPT, PAGED), (PAGED, SCRIPT), (SCRIPT_8BIT, PAGED_8BIT), (PAGED_8BIT, SCRIPT_8BIT)],
)
def test_a_run_goes_on_on_another_card_with_the_states_that_it_has(llama_1b, tmp_path, kept, foreseen):
    draw = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(1, 250, (64 + 8 * i,), generator=draw).tolist()} for i in range(16)]

    def trainer(cls, optim):
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_1b, dtype=torch.bfloat16), LORA)
        args = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=4,
            max_steps=4,
            save_steps=2,
            learning_rate=1e-3,
            optim=optim,
            **COMMON,
        )
        return cls(model=model, args=args, train_dataset=rows, data_collator=pad)

    whole = trainer(Trainer, kept)
    start = weights(whole)
    whole.train()
    trainer(AutoFitTrainer, kept).train()
    scripts, paged = (SCRIPT, PAGED) if SCRIPT in (kept, foreseen) else (SCRIPT_8BIT, PAGED_8BIT)
    again = trainer(AutoFitTrainer, scripts)
    again._optimizers, again._optim = (scripts, paged), foreseen
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert again.state.global_step == 4
    assert again.args.optim == scripts
    far = farthest(weights(whole), weights(again), start)
    print(kept, far)
    assert far < 1e-3
