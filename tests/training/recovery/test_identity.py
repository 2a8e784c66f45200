"""A checkpoint is gone on from by the run that it is of, and by no other."""

import array
import copy
import functools
import os
import random
import time

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig, get_peft_model

from autofit.errors import UsageError
from autofit.training.recovery import contents, identity
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


class Rows(torch.utils.data.Dataset):
    """The examples as they are made one by one; with random numbers, counted, or from an open file."""

    def __init__(self, shift=0, noise=None, file=None):
        self.rows, self.shift, self.noise, self.file, self.count = examples(), shift, noise, file, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        self.count += 1
        if place == 7 and self.file == "torn":
            raise OSError("torn")
        drawn = 0 if self.noise is None else self.noise()
        return {"input_ids": [(token + self.shift + drawn) % 60 + 1 for token in self.rows[place]["input_ids"]]}


def test_rows_that_a_data_set_makes_are_looked_at(made, tmp_path):
    given = {**RUN, "output_dir": str(tmp_path)}
    made(AutoFitTrainer, train_dataset=Rows(), **given).train()
    with pytest.raises(UsageError, match="is of another run: the data was"):
        made(AutoFitTrainer, train_dataset=Rows(7), **given).train(resume_from_checkpoint=True)
    again = made(AutoFitTrainer, train_dataset=Rows(), **given)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 2


NOISES = {
    "torch": lambda: int(torch.randint(50, ())),
    "random": lambda: random.randrange(50),
    "numpy": lambda: int(np.random.randint(50)),
}


@pytest.mark.parametrize("noise", [*NOISES, "its own"])
def test_rows_that_are_others_each_time_are_left_out_and_looking_draws_no_number(noise):
    generator = random.Random(0)
    dataset = Rows(noise=NOISES.get(noise, functools.partial(generator.randrange, 50)))
    before = random_state()
    assert identity._data(dataset) == {"examples": 16}
    assert random_state() == before
    assert dataset.count == 0
    assert generator.getstate() == random.Random(0).getstate()


def random_state():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


OWN = random.Random(0)


def test_generators_that_the_rows_are_made_with_draw_nothing_either():
    """As those of a library for augmentation, that a script holds somewhere."""
    dataset = Rows(noise=lambda: OWN.randrange(50))
    assert identity._data(dataset) == {"examples": 16}
    assert OWN.getstate() == random.Random(0).getstate()
    assert dataset.count == 0


def test_a_data_set_that_cannot_be_looked_at_has_its_length_alone(tmp_path, monkeypatch):
    (tmp_path / "rows").write_text("abc" * 10)
    with (tmp_path / "rows").open() as file:
        for dataset in (Rows(file=file), Rows(file="torn"), Rows(noise=lambda: os._exit(3))):
            assert identity._data(dataset) == {"examples": 16}
    monkeypatch.setattr(contents, "_SECONDS", 0.2)
    assert identity._data(Rows(noise=lambda: time.sleep(9) or 0)) == {"examples": 16}


def test_what_was_not_known_of_the_data_is_no_difference():
    known, unknown = ({"data": {"examples": 3, **more}} for more in ({"the data": "a"}, {}))
    assert identity.first_difference(known, unknown) is identity.first_difference(unknown, known) is None


def test_data_within_a_data_set_within_another_count_at_the_places_that_are_looked_at():
    values = torch.arange(50_000).reshape(500, 100)
    dataset = torch.utils.data.Subset(torch.utils.data.TensorDataset(values), range(400))
    known = identity._data(dataset)
    assert known["the data"]
    values[1] = 0  # every second row is
    assert identity._data(dataset) == known
    values[2, 3] = 0
    assert identity._data(dataset) != known


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[3]["x"].__setitem__(slice(900, 1100), 5),
        lambda rows: rows[3]["y"].__setitem__(2500, 1.0),
        lambda rows: rows[3]["z"][1].__setitem__(0, torch.ones(1)),
        lambda rows: rows[3].update(z=(rows[3]["z"][0], tuple(rows[3]["z"][1]), None)),
        lambda rows: rows[3].update(x=rows[3]["x"].float()),
        lambda rows: rows[3].update(x=rows[3]["x"].reshape(40, 50)),
        lambda rows: rows[3].update(w=rows[3].pop("y")),
        lambda rows: rows.reverse(),
    ],
)
def test_every_value_of_a_list_counts(change):
    def rows():
        return [
            {
                "x": torch.arange(2000) % 60 + i,
                "y": np.zeros(5000),
                "z": ("text", [torch.zeros(1, dtype=torch.bfloat16)]),
            }
            for i in range(4)
        ]

    changed = rows()
    change(changed)
    assert identity._data(rows()) == identity._data(rows()) != identity._data(changed)


def test_of_an_object_its_values_count_and_not_where_it_lies():
    class Example:
        def __init__(self, value):
            self.value = value

    assert contents.hash_rows([Example(1)]) == contents.hash_rows([Example(1)]) != contents.hash_rows([Example(2)])
    images = [array.array("B", [color] * 16) for color in (1, 1, 2)]  # with bytes, as those of Pillow
    hashes = [contents.hash_rows([{"image": image}]) for image in images]
    assert hashes[0] == hashes[1] != hashes[2]


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
