"""A checkpoint is gone on from by the run that it is of, and by no other."""

import copy
import random

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig, get_peft_model

from autofit.errors import UsageError
from autofit.training.recovery import identity
from autofit.training.recovery.identity import samples_done
from autofit.training.recovery.trainers import AutoFitTrainer
from tests.training.recovery.conftest import examples

RUN = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


def adapted(model, **given):
    torch.manual_seed(0)
    return get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **given)
    )


@pytest.fixture
def folder(made, tiny_llama, tmp_path):
    ours = made(AutoFitTrainer, adapted(tiny_llama), output_dir=str(tmp_path), **RUN)
    ours.train()
    return tmp_path


@pytest.mark.parametrize(
    ("given", "difference"),
    [
        ({"learning_rate": 2e-2}, r"learning_rate was 0.01 and is 0.02"),
        ({"seed": 12}, r"seed was 11 and is 12"),
        ({"max_steps": 3}, r"max_steps was 2 and is 3"),
        ({"max_steps": -1, "num_train_epochs": 2}, r"max_steps was 2 and is -1"),
        ({"lr_scheduler_type": "cosine"}, r"lr_scheduler_type was 'linear' and is 'cosine'"),
        ({"gradient_accumulation_steps": 1}, r"samples in a step was 8 and is 4"),
        ({"optim": "sgd"}, r"optim was 'adamw_torch.*' and is 'sgd'"),
        ({"train_dataset": examples()[:-1]}, r"examples was 16 and is 15"),
        ({"train_dataset": [*examples()[:-1], {"input_ids": [1, 2]}]}, r"the data was '\w+' and is '\w+'"),
    ],
)
def test_another_run_is_refused_by_the_first_difference(made, tiny_llama, folder, given, difference):
    other = made(AutoFitTrainer, adapted(tiny_llama), output_dir=str(folder), **{**RUN, **given})
    with pytest.raises(UsageError, match=rf"checkpoint-2 is of another run: {difference}; .*force_resume=True"):
        other.train(resume_from_checkpoint=True)


def test_it_may_be_forced(made, tiny_llama, folder):
    other = made(AutoFitTrainer, adapted(tiny_llama), output_dir=str(folder), **{**RUN, "max_steps": 3})
    other.train(resume_from_checkpoint=True, force_resume=True)
    assert other.state.global_step == 3


def test_another_base_or_adapter_is_refused_but_never_for_the_weights_that_are_restored(made, tiny_llama, folder):
    def goes_on(model):
        made(AutoFitTrainer, model, output_dir=str(folder), **RUN).train(resume_from_checkpoint=True)

    other = copy.deepcopy(tiny_llama)
    other.model.layers[0].mlp.down_proj.weight.data += 1e-3
    with pytest.raises(UsageError, match="the frozen base was"):
        goes_on(adapted(other))
    with pytest.raises(UsageError, match=r"lora_alpha of adapter default was 8 and is 16"):
        goes_on(adapted(tiny_llama, lora_alpha=16))
    with pytest.raises(UsageError, match="the parameters' layout was"):
        goes_on(adapted(tiny_llama, layers_to_transform=[0], modules_to_save=["lm_head"]))
    fresh = adapted(tiny_llama)
    for parameter in fresh.parameters():
        if parameter.requires_grad:
            parameter.data += 1.0
    goes_on(fresh)


@pytest.mark.parametrize(
    "given",
    [
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        {"logging_steps": 5, "save_steps": 2, "save_total_limit": 3, "dataloader_num_workers": 1},
        {"gradient_checkpointing": True},
    ],
)
def test_what_decides_nothing_is_free(made, tiny_llama, folder, given):
    other = made(AutoFitTrainer, adapted(tiny_llama), output_dir=str(folder), **{**RUN, **given})
    other.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert other.state.global_step == 2


def test_data_are_known_by_their_rows_wherever_they_lie(tmp_path, monkeypatch):
    rows = {
        "input_ids": [[i] * (i % 7 + 1) for i in range(3000)],
        "weight": [None if i % 5 else 1.5 for i in range(3000)],
    }
    data = Dataset.from_dict(rows)
    known = identity._hash_dataset(data)
    data.save_to_disk(tmp_path, num_shards=3)
    back = list(range(2999, -1, -1))
    for same in (load_from_disk(tmp_path), data.map(lambda row: row), data.select(back).select(back)):
        assert identity._hash_dataset(same) == known
    other = [Dataset.from_dict({**rows, "weight": [None] * 3000}), data.select(back), data.rename_column("weight", "w")]
    rows["input_ids"][1777] = [9]
    other.append(Dataset.from_dict(rows))
    assert len({known, *(identity._hash_dataset(one) for one in other)}) == 5
    monkeypatch.setattr(identity, "_MOST_DATA_BYTES", 1000)
    monkeypatch.setattr(identity, "_PLACES", 1)
    assert identity._hash_dataset(load_from_disk(tmp_path)) == identity._hash_dataset(data) != known


def test_looking_takes_no_random_number(made):
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    ours = made(AutoFitTrainer)
    torch.set_rng_state(before[0])
    identity.identity(ours)
    assert torch.equal(before[0], torch.get_rng_state())


@pytest.mark.parametrize("given", [{}, {"dataloader_drop_last": True}, {"per_device_train_batch_size": 3}])
def test_the_cursor_counts_what_the_loop_has_trained_on(made, given):
    seen = []

    class Counting(AutoFitTrainer):
        def training_step(self, model, inputs, *args):
            seen.append(len(inputs["input_ids"]))
            return super().training_step(model, inputs, *args)

    ours = made(Counting, max_steps=7, train_dataset=examples()[:13], **given)
    counted = []
    original = ours._maybe_log_save_evaluate

    def spy(*args, **kwargs):
        counted.append((samples_done(ours), sum(seen)))
        return original(*args, **kwargs)

    ours._maybe_log_save_evaluate = spy
    ours.train()
    assert counted
    assert all(cursor == trained for cursor, trained in counted)
