"""A disk that is full, at any operation or for real, and signals in the middle of a save."""

import ctypes
import errno
import os
import re
import signal

import pytest

from autofit.errors import AutofitError
from autofit.training import checkpoints
from tests.training.recovery.conftest import newest
from tests.training.recovery.forked import Disk, forked

SAVED = {"max_steps": 3, "save_steps": 1}
_PRIVATE, _NEW_MOUNTS = 1 << 18 | 1 << 14, 0x00020000


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def whole(folder):
    """Whether there is nothing that looks like a checkpoint and is not one."""
    return not any(checkpoints.verify(path) for path in folder.glob("checkpoint-*"))


def ends_in_one_line(ours, folder, at):
    """The disk is full at that operation; it ends with 7 where training says so, with 5 if none came."""
    train, disk = ours.train, Disk(folder, at, does=full)

    def expecting(**kwargs):
        try:
            train(**kwargs)
        except AutofitError as error:
            words = r"checkpoint-\d could not be written: .*No space left on device.* are free"
            os._exit(7 if re.search(words, str(error)) else 1)
        if disk.count <= at:
            os._exit(5)

    ours.train = expecting


def test_a_disk_that_is_full_at_any_operation_of_a_save(run, tmp_path):
    """Of three saves, the last of which removes the checkpoint of the first."""
    expected, outcomes, reached = run.undisturbed(**SAVED), [], 0
    for number in range(30, 1000, 5):
        folder = tmp_path / str(number)

        ended = run(folder, lambda ours, on=folder, at=number: ends_in_one_line(ours, on, at), **SAVED)
        outcomes.append(ended)
        assert ended in (0, 5, 7), number  # 0: what cannot be removed stays
        assert newest(folder) >= reached, number
        assert whole(folder), number
        reached = newest(folder) if ended == 7 else reached
        if ended == 5:
            break
        assert run.goes_on(folder, expected, **SAVED), number
    assert outcomes.count(7) > 10
    assert reached >= 2


def mounted(folder, kib):
    """Whether this process, and nobody else, now has a disk of so many KiB there."""
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_MOUNTS) or libc.mount(None, b"/", None, _PRIVATE, None):
        return False
    return libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, f"size={kib}k".encode()) == 0


@pytest.mark.parametrize("kib", [340, 370, 400, 430])
def test_a_real_disk_that_is_full_keeps_the_checkpoints_before(made, with_dropout, run, tmp_path, kib, monkeypatch):
    """One of a few checkpoints' size; it that trains goes on itself, for the disk goes with it."""
    from autofit.training.recovery.trainers import AutoFitTrainer

    monkeypatch.setattr("autofit.training.recovery.saving._SMALL_FILES_BYTES", 0)

    def work():
        if not mounted(tmp_path / "disk", kib):
            os._exit(77)
        folder = tmp_path / "disk" / "run"
        ours = made(
            AutoFitTrainer, with_dropout, output_dir=str(folder), max_steps=9, save_strategy="steps", save_steps=1
        )
        ours.args.save_total_limit = None
        with pytest.raises(AutofitError, match=r"No space left|unexpected pos|of disk, .* are free|is torn"):
            ours.train()
        assert whole(folder)
        assert newest(folder) == ours.state.global_step - 1 >= 1
        assert not (folder / checkpoints.STAGING).exists()

    ended = forked(work)
    if ended == 77:
        pytest.skip("no disk can be mounted here")
    assert ended == 0


@pytest.mark.parametrize("times", [1, 2])
def test_signals_in_the_middle_of_a_save(run, tmp_path, times):
    """One: that save is completed, and training ends. Two: it ends at once, and what was saved before is whole."""
    expected = run.undisturbed(**SAVED)
    for number in (40, 47, 52, 56, 60, 64):
        folder = tmp_path / str(number)

        def spoil(ours, on=folder, at=number):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            Disk(on, at, does=lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(times)])

        ended = run(folder, spoil, **SAVED)
        assert ended == (143 if times == 1 else -signal.SIGTERM), number
        assert whole(folder)
        saved = newest(folder)
        assert saved == (2 if times == 1 else 1), number
        assert not (folder / "end").exists()
        assert run.goes_on(folder, expected, **SAVED), number
