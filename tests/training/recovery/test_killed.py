"""Whatever ends a training, and wherever: it goes on as if nothing had happened."""

import os
import random
import resource
import shutil
import signal
import sys

import pytest
import torch
from transformers import Trainer, TrainerCallback

from autofit.errors import AutofitError
from autofit.training import checkpoints
from autofit.training.recovery.trainers import AutoFitTrainer
from tests.training.recovery.conftest import RUN, FailingAllocations, examples, newest, same
from tests.training.recovery.forked import Disk, KilledAt


def test_killed_at_any_event_of_a_run(run, tmp_path):
    for number in range(1000):
        folder = tmp_path / str(number)
        ended = run(folder, lambda ours, number=number: ours.add_callback(KilledAt(number)))
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        assert run.goes_on(folder), number
        shutil.rmtree(folder)
    assert number > 40


@pytest.mark.parametrize("loses_unsynced", [False, True], ids=["killed", "power lost"])
def test_killed_at_any_operation_of_saves(run, tmp_path, loses_unsynced):
    """Three saves, the last of which removes the checkpoint of the first; of the first itself only a few operations."""
    given = {"max_steps": 3, "save_steps": 1}
    expected = run.undisturbed(**given)
    reached = 0
    for number in (*range(0, 30, 5), *range(30, 1000, 2 if loses_unsynced else 1)):
        folder = tmp_path / str(number)
        ended = run(folder, lambda ours, at=number, at_=folder: Disk(at_, at, loses_unsynced), **given)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        assert newest(folder) >= reached, number
        reached = newest(folder)
        assert run.goes_on(folder, expected, **given), number
        shutil.rmtree(folder)
    assert number > 100
    assert reached == 3


def test_killed_five_times_in_one_epoch_and_out_of_memory_in_between(run, tmp_path):
    """Sixteen steps of an epoch and a few of the next; a loader with a worker."""
    given = {"max_steps": 20, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 1, "save_steps": 1}
    expected = run.undisturbed(**given)
    given["dataloader_num_workers"] = 1
    kills = [("step_end", 2), ("optimizer_step", 4), ("pre_optimizer_step", 0), ("step_begin", 3), ("save", 1)]
    for event, number in kills:

        def spoil(ours, event=event, number=number):
            ours.add_callback(KilledAt(number, event))
            FailingAllocations(range(40, 100_000, 400)).__enter__()

        assert run(tmp_path / "run", spoil, **given) == -signal.SIGKILL
    assert 8 <= newest(tmp_path / "run") < 16
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert events.count('"oom"') > 5
    assert run.goes_on(tmp_path / "run", expected, **given)


def test_at_the_last_step_no_step_is_taken_twice(run, tmp_path):
    """Also where the last step is not an epoch's: the stock class would take one more."""
    given = {"lr_scheduler_type": "constant"}  # else one step more would be of rate 0
    expected = run.undisturbed(**given)
    for folder, event, at in ((tmp_path / "saved", "train_end", 0), (tmp_path / "saving", "save", 3)):
        assert run(folder, lambda ours, at=at, event=event: ours.add_callback(KilledAt(at, event)), **given) < 0
        assert newest(folder) == 7
        assert run.goes_on(folder, expected, **given)
        assert checkpoints.facts_of(folder / "checkpoint-7")["samples"] == 16 + 3 * 4


def test_stock_goes_on_from_ours_and_we_from_stock_s(run, tmp_path):
    stop = KilledAt(4, "step_end")
    assert run(tmp_path / "ours", lambda ours: ours.add_callback(stop)) < 0
    assert run.goes_on(tmp_path / "ours", cls=Trainer)
    assert run(tmp_path / "stock", lambda stock: stock.add_callback(stop), cls=Trainer) < 0
    assert newest(tmp_path / "stock") == 4
    assert not (tmp_path / "stock" / "checkpoint-4" / "manifest.json").exists()
    assert run.goes_on(tmp_path / "stock")


def test_another_split_of_the_same_batch_goes_on(run, tmp_path):
    assert run(tmp_path / "run", lambda ours: ours.add_callback(KilledAt(4, "step_end"))) < 0
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    assert run(tmp_path / "run", **given) == 0
    end = torch.load(tmp_path / "run" / "end")
    assert all(torch.allclose(end[name], value, atol=0.01) for name, value in run.expected.items())


def largest_files(bytes_, kills):
    """From the third step on no file may become larger than that, as where the disk is full."""

    class Full(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # pytest's are files
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kills else signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))

    return Full()


@pytest.mark.parametrize("bytes_", [0, 700, 1100, 1500, 3000, 8000, 30_000, 60_000])
def test_a_full_disk_leaves_the_checkpoint_before_and_says_what_it_needs(run, tmp_path, bytes_):
    folder = tmp_path / "run"

    def spoil(ours):
        ours.add_callback(largest_files(bytes_, kills=False))
        train = ours.train

        def expecting(**kwargs):
            message = r"checkpoint-4 could not be written: .* it needs about \S+ \S+, \S+ \S+ are free"
            with pytest.raises(AutofitError, match=message):
                train(**kwargs)
            os._exit(7)

        ours.train = expecting

    assert run(folder, spoil) == 7
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["checkpoint-2"]
    assert run.goes_on(folder)


@pytest.mark.parametrize("bytes_", [0, 1100, 8000, 60_000])
def test_killed_in_the_middle_of_a_file(run, tmp_path, bytes_):
    folder = tmp_path / "run"
    assert run(folder, lambda ours: ours.add_callback(largest_files(bytes_, kills=True))) == -signal.SIGXFSZ
    assert newest(folder) == 2
    assert run.goes_on(folder)


def test_too_little_space_is_seen_before_anything_is_written(made, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: type("usage", (), {"free": 2**20}))
    ours = made(AutoFitTrainer, output_dir=str(tmp_path), **RUN)
    with pytest.raises(AutofitError, match=r"needs 67.\d MB of disk, 1.0 MB are free"):
        ours.train()
    assert not list(tmp_path.glob("*checkpoint*"))


class DeadlyRows(torch.utils.data.Dataset):
    """The examples; a loader's worker that fetches its n-th is killed, the first that does."""

    def __init__(self, flag, at):
        self.rows, self.flag, self.at, self.count = examples(), flag, at, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        self.count += 1
        if torch.utils.data.get_worker_info() is not None and self.count == self.at and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.rows[row]


@pytest.mark.parametrize("at", [13, 16])
def test_a_killed_worker_of_the_loader_is_said_and_the_run_can_go_on(run, tmp_path, at):
    given = {"save_steps": 1, "dataloader_num_workers": 1, "train_dataset": DeadlyRows(tmp_path / "killed", at)}

    def spoil(ours):
        train = ours.train

        def expecting(**kwargs):
            # Killed while a batch is handed over, it is the connection that breaks.
            message = r"DataLoader worker \(pid.*\) (is killed by signal|exited unexpectedly)|Connection re|^$"
            with pytest.raises((RuntimeError, OSError, EOFError), match=message):
                train(**kwargs)
            os._exit(7)

        ours.train = expecting

    folder = tmp_path / "run"
    assert run(folder, spoil, **given) == 7
    assert newest(folder) >= 1
    assert not any(checkpoints.verify(path) for path in folder.glob("checkpoint-*"))
    assert run.goes_on(folder, **given)


@pytest.mark.soak
def test_whole_runs_killed_and_damaged_at_random(run, tmp_path):
    seed = random.SystemRandom().randrange(10**6)  # the trainers seed the others
    draw = random.Random(seed)
    given = {"max_steps": 40, "save_steps": 1, "dataloader_num_workers": 1, "save_total_limit": 3}
    expected = run.undisturbed(**{**given, "dataloader_num_workers": 0})
    for number in range(8):
        folder, ends = tmp_path / str(number), []
        while not ends or ends[-1] != 0:
            assert len(ends) < 200, (seed, number, ends)
            signals = [(draw.uniform(0.05, 1.5), draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))]
            if draw.random() < 0.3:
                signals.append((draw.uniform(0.0, 0.05), signal.SIGTERM))
            first = draw.randrange(2000)

            def spoil(ours, first=first):
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                train = ours.train

                def failing(**kwargs):
                    with FailingAllocations(range(first, 10**6, 2000)):
                        train(**kwargs)

                ours.train = failing

            ends.append(run(folder, spoil, signals=signals, **given))
            assert ends[-1] in (0, 143, -signal.SIGTERM, -signal.SIGKILL), (seed, number, ends)
            left = sorted(folder.glob("checkpoint-*"), key=checkpoints.step_of)
            if len(left) > 1 and draw.random() < 0.2:
                victim = draw.choice(sorted(left[-1].iterdir()))
                os.truncate(victim, draw.randrange(victim.stat().st_size))
        assert same(torch.load(folder / "end"), expected), (seed, number, ends)
        shutil.rmtree(folder)
