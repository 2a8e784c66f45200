"""A checkpoint that is not what was written is never gone on from."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Trainer

from autofit.errors import UsageError
from autofit.training import checkpoints
from autofit.training.checkpoints import prune, publish, recover, stage, verify
from autofit.training.recovery.trainers import AutoFitTrainer
from tests.training.recovery.conftest import examples, made, same, tiny_llama, weights

__all__ = ["made", "tiny_llama"]

RUN = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def emptied(path):
    os.truncate(path, 0)


def removed(path):
    path.unlink()


@pytest.fixture
def trained(made, tmp_path):
    """The folder of a run whose checkpoints are those of steps 2 and 3, and its weights."""
    ours = made(AutoFitTrainer, output_dir=str(tmp_path / "run"), **RUN)
    ours.train()
    return tmp_path / "run", weights(ours)


def goes_on(made, folder, cls=AutoFitTrainer, checkpoint=True, force_resume=False, **given):
    ours = made(cls, output_dir=str(folder), **{**RUN, **given})
    forced = {"force_resume": True} if force_resume else {}
    ours.train(resume_from_checkpoint=checkpoint, **forced)
    return weights(ours)


@pytest.mark.parametrize("damage", [truncated, flipped, emptied, removed])
def test_with_any_file_damaged_the_one_before_is_gone_on_from(made, trained, damage, tmp_path):
    folder, expected = trained
    names = [path.name for path in (folder / "checkpoint-3").iterdir()]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} < set(names)
    for name in names:
        if damage is removed and name == "manifest.json":
            continue  # it is a checkpoint of the stock class then
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        damage(copy / "checkpoint-3" / name)
        (wrong,) = verify(copy / "checkpoint-3")
        assert wrong.startswith(name)
        with pytest.raises(UsageError, match=f"checkpoint-3 is broken: {name}"):
            goes_on(made, copy, checkpoint=str(copy / "checkpoint-3"))
        warnings = []
        assert recover(copy, warnings.append) == copy / "checkpoint-2"
        assert len(warnings) == 1
        assert name in warnings[0]
        assert (copy / "_broken-checkpoint-3").is_dir()
        assert same(goes_on(made, copy), expected), name


def test_where_all_are_broken_it_says_so(made, trained):
    folder, _ = trained
    for step in (2, 3):
        flipped(folder / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(UsageError, match="holds no whole checkpoint"):
        goes_on(made, folder)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert ["optimizer.pt is not what was written" in event["message"] for event in events] == [True, True]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_torn_checkpoint_of_the_stock_class_is_seen(made, tmp_path, name):
    stock = made(Trainer, output_dir=str(tmp_path), **RUN)
    stock.train()
    assert verify(tmp_path / "checkpoint-3") == []
    truncated(tmp_path / "checkpoint-3" / name)
    (wrong,) = verify(tmp_path / "checkpoint-3")
    assert name in wrong
    assert same(goes_on(made, tmp_path), weights(stock))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_nothing_is_unpickled(made, trained, name, tmp_path, monkeypatch):
    """Nor is the arguments' file, which holds a pickled object in every checkpoint, ever read."""
    folder, expected = trained
    monkeypatch.chdir(tmp_path)
    checkpoint = folder / "checkpoint-2"
    (checkpoint / "manifest.json").unlink()
    torch.save(Bomb(), checkpoint / name)
    if name == "training_args.bin":
        assert same(goes_on(made, folder, checkpoint=str(checkpoint)), expected)
    else:
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            goes_on(made, folder, checkpoint=str(checkpoint))
    assert not (tmp_path / "exploded").exists()
    torch.save(Bomb(), checkpoint / name)
    torch.load(checkpoint / name, weights_only=False)
    assert (tmp_path / "exploded").exists()


def test_weights_alone_are_not_gone_on_from_unless_forced(made, tmp_path):
    goes_on(made, tmp_path, checkpoint=None, save_only_model=True)
    assert verify(tmp_path / "checkpoint-3") == []
    with pytest.raises(UsageError, match=r"has no optimizer.pt: .* force_resume=True"):
        goes_on(made, tmp_path)
    goes_on(made, tmp_path, force_resume=True)


def test_two_are_kept_and_the_best(made, tmp_path):
    def kept(folder):
        return sorted(path.name for path in (tmp_path / folder).glob("*checkpoint*"))

    goes_on(made, tmp_path / "one", checkpoint=None, max_steps=4, save_total_limit=1)
    assert kept("one") == ["checkpoint-3", "checkpoint-4"]
    goes_on(made, tmp_path / "all", checkpoint=None, max_steps=4, save_total_limit=None)
    assert len(kept("all")) == 4
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
    best |= {"metric_for_best_model": "loss", "eval_dataset": examples()}  # the highest loss is the first
    ours = made(AutoFitTrainer, output_dir=str(tmp_path / "best"), **{**RUN, "max_steps": 5, **best})
    ours.train()
    assert ours.state.best_global_step == 1
    assert kept("best") == ["checkpoint-1", "checkpoint-5"]
    state = json.loads((tmp_path / "best" / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == ours.state.best_model_checkpoint == str(tmp_path / "best" / "checkpoint-1")


def small(folder, step, value=0.0):
    staged = stage(folder) / f"checkpoint-{step}"
    staged.mkdir()
    save_file({"a": torch.full((4,), value)}, staged / "model.safetensors")
    (staged / "trainer_state.json").write_text("{}")
    publish(staged, folder / f"checkpoint-{step}", {"value": value})


def test_the_same_step_again_replaces_and_an_interruption_of_that_is_undone(tmp_path, monkeypatch):
    small(tmp_path, 5, 1.0)
    small(tmp_path, 5, 2.0)
    assert checkpoints.facts_of(tmp_path / "checkpoint-5") == {"value": 2.0}
    genuine = os.rename

    def only_away(error):
        def rename(source, target):
            if "_saving" in str(source):
                raise error
            genuine(source, target)

        monkeypatch.setattr(os, "rename", rename)

    only_away(OSError("full"))
    with pytest.raises(OSError, match="full"):
        small(tmp_path, 5, 3.0)
    assert checkpoints.facts_of(tmp_path / "checkpoint-5") == {"value": 2.0}
    only_away(KeyboardInterrupt())  # stands for a kill: nothing is put right
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path, 5, 3.0)
    monkeypatch.undo()
    assert not (tmp_path / "checkpoint-5").exists()
    assert recover(tmp_path, print) == tmp_path / "checkpoint-5"
    assert checkpoints.facts_of(tmp_path / "checkpoint-5") == {"value": 2.0}


def test_an_earlier_run_s_higher_steps_do_not_push_out_new_ones(tmp_path):
    for number, step in enumerate((100, 200, 10, 20)):
        small(tmp_path, step)
        os.utime(tmp_path / f"checkpoint-{step}", ns=(number * 10**9, number * 10**9))
    truncated(tmp_path / "checkpoint-20" / "model.safetensors")
    prune(tmp_path, 1, [])
    left = sorted(path.name for path in tmp_path.glob("*checkpoint*"))
    assert left == ["checkpoint-10", "checkpoint-20", "checkpoint-200"]  # the torn one counts for nothing


def test_a_writer_that_says_nothing_of_a_full_disk_is_seen(tmp_path):
    staged = stage(tmp_path) / "checkpoint-1"
    staged.mkdir()
    torch.save({"a": torch.zeros(1000)}, staged / "optimizer.pt")
    truncated(staged / "optimizer.pt")
    with pytest.raises(OSError, match=r"optimizer.pt is torn"):
        publish(staged, tmp_path / "checkpoint-1", {})
    assert not (tmp_path / "checkpoint-1").exists()


def test_what_is_pushed_is_the_published_folder(made, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append((folder, verify(Path(folder))))
    )
    ours = made(AutoFitTrainer, output_dir=str(tmp_path), **RUN)
    ours.args.push_to_hub = True
    monkeypatch.setattr(ours, "_finish_current_push", lambda: None)
    ours.train()
    assert pushed == [(str(tmp_path / f"checkpoint-{step}"), []) for step in (1, 2, 3)]


def test_a_whole_checkpoint_is_read_once_until_it_is_touched(tmp_path, monkeypatch):
    folder = stage(tmp_path)
    save_file({"w": torch.ones(8)}, folder / "model.safetensors")
    publish(folder, tmp_path / "checkpoint-1", {})
    read = []
    genuine = checkpoints._hash_file
    monkeypatch.setattr(checkpoints, "_hash_file", lambda path: read.append(path) or genuine(path))
    assert verify(tmp_path / "checkpoint-1") == verify(tmp_path / "checkpoint-1") == []
    assert len(read) == 1
    flipped(tmp_path / "checkpoint-1" / "model.safetensors")
    assert verify(tmp_path / "checkpoint-1") == ["model.safetensors is not what was written"]
