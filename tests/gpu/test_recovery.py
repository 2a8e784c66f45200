"""A card that runs out of memory inside training: the result is that of one that does not."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from autofit.training.recovery.faults import free_memory
from autofit.training.recovery.trainers import AutoFitTrainer
from tests.training.recovery.conftest import farthest, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

LENGTHS = [512, 300, 700, 450, 90, 1024, 620, 210]


def pad(rows):
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[i, : len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def made(cls, model, folder, **given):
    draw = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(1, 8000, (n,), generator=draw).tolist()} for n in LENGTHS * 4]
    arguments = TrainingArguments(
        output_dir=str(folder / cls.__name__),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_grad_norm=1.0,
    )
    return cls(model=copy.deepcopy(model), args=arguments, train_dataset=data, data_collator=pad, **given)


def test_a_real_out_of_memory_changes_nothing(tmp_path):
    free_memory()  # what other tests have left counts in the peak below
    set_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 8192}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8)).float()
    stock = made(Trainer, model, tmp_path)
    start = weights(stock)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    stock.train()
    peak = torch.cuda.max_memory_reserved()
    expected = weights(stock)
    lines = [line["loss"] for line in stock.state.log_history if "loss" in line]
    del stock
    torch.cuda.empty_cache()
    ours = made(AutoFitTrainer, model, tmp_path)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((held + 0.6 * (peak - held)) / total)
    try:
        ours.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any(event["event"] == "oom" and "CUDA out of memory" in event["message"] for event in ours.recovery.events)
    assert farthest(expected, weights(ours), start) < 1e-3
    found = [line["loss"] for line in ours.state.log_history if "loss" in line]
    assert found == pytest.approx(lines, rel=1e-4)
    assert ours.state.global_step == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_changes_gradients_takes_no_memory(dtype):
    """Clipping relies on it: what ran out of memory has changed none of them."""
    gradients = [torch.ones(300, 40, dtype=dtype, device="cuda") for _ in range(200)]
    factor, found = torch.tensor(0.5, device="cuda"), torch.zeros((), device="cuda")
    taken = []
    for _ in range(2):  # the first loads the kernels
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch._foreach_mul_(gradients, factor)
        if dtype is torch.float32:  # only those are ever scaled
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, factor)
        taken.append(torch.cuda.memory_stats()["allocation.all.allocated"] - before)
    assert taken == [0, 0]


class Own:
    """A step that leaves it to the loader to move its inputs."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = model(**inputs).loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_step_of_one_s_own_gets_its_inputs_on_the_card(tmp_path):
    free_memory()
    set_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 8192}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).float()
    trainers = [made(type("Mine", (Own, cls), {}), model, tmp_path) for cls in (Trainer, AutoFitTrainer)]
    start = weights(trainers[0])
    for trainer in trainers:
        trainer.train()
    assert farthest(*map(weights, trainers), start) < 1e-5
