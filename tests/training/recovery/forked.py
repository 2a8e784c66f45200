"""Trainings in forked children that are killed, lose what was not synced, or have no disk."""

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
import tqdm.auto
from transformers import TrainerCallback

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_MOVES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def forked(work, *args, signals=(), seconds=120):
    """Runs `work` in a fork; returns its exit code, or the signal that ended it, negative.

    Args:
        signals: sent to it, each with the seconds to wait before.
        seconds: after which it is ended by SIGALRM.
    """
    child = os.fork()
    if child == 0:
        code = 1
        os.setsid()
        signal.alarm(seconds)
        faulthandler.dump_traceback_later(seconds - 5, file=sys.__stderr__)  # where it hangs, should it
        torch.set_num_threads(1)  # OpenMP's threads are not in the fork
        own_locks()
        try:
            work(*args)
            code = 0
        except SystemExit as end:
            code = end.code
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    for wait, number in signals:
        time.sleep(wait)
        os.kill(child, number)  # not waited for yet, so there is one
    descriptor = os.pidfd_open(child)
    if not select.select([descriptor], [], [], seconds - 4)[0]:
        print(_threads_of(child), file=sys.stderr)
    os.close(descriptor)
    status = os.waitpid(child, 0)[1]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # a loader's worker that had not yet looked whose child it is
    return os.waitstatus_to_exitcode(status)


def _threads_of(process):
    """What its threads wait for in the kernel, and how long they ran: the stack alone does not say whether one does."""
    lines = []
    for task in Path(f"/proc/{process}/task").iterdir():
        user, system = (task / "stat").read_text().rpartition(")")[2].split()[11:13]
        lines.append(f"thread {task.name}: in {(task / 'wchan').read_text()}, ran {user} + {system} ticks")
    return "\n".join(lines)


def own_locks():
    """In a fork: a progress bar's lock is shared with the forks before, one of which was killed with it, maybe."""
    for kind in (tqdm.std.tqdm, tqdm.auto.tqdm):
        kind.set_lock(threading.RLock())


class Disk:
    """What this process does to a folder, operation by operation; for the rest of its life, so only in a fork.

    Args:
        at: before the operation of this number it is killed.
        does: instead of that.
        loses_unsynced: then, first, files and renames that were never synced are lost, as with the power.
    """

    def __init__(self, folder, at=None, loses_unsynced=False, does=lambda: os.kill(os.getpid(), signal.SIGKILL)):
        self.folder, self.at, self.loses_unsynced, self.does = Path(folder), at, loses_unsynced, does
        self.count, self.synced, self.renames, self.names = 0, set(), [], []
        self._fsync = os.fsync
        os.fsync = self._synced
        sys.addaudithook(self._hook)

    def _hook(self, event, args):
        if self.count is None:
            return
        path = args[0] if args and isinstance(args[0], (str, os.PathLike)) else None
        within_a_folder = event in ("os.remove", "os.rmdir") and args[1] != -1  # as rmtree goes about it
        if path is None or not (within_a_folder or Path(path).absolute().is_relative_to(self.folder)):
            return
        if event == "open" and (args[2] or 0) & _WRITES:
            self._next(f"open {path}")
        elif event in _MOVES:
            self._next(f"{event} {path}")
            if event == "os.rename":
                self.renames.append((Path(args[0]), Path(args[1])))

    def _synced(self, number):
        self._next("fsync")
        self._fsync(number)
        inode = os.fstat(number).st_ino
        self.synced.add(inode)
        self.renames = [(a, b) for a, b in self.renames if os.stat(b.parent).st_ino != inode]

    def _next(self, name):
        self.names.append(name)
        self.count += 1
        if self.count - 1 == self.at:
            if self.loses_unsynced:
                self._lose()
            self.does()

    def _lose(self):
        self.count = None  # what follows is no operation of the process
        for source, target in reversed(self.renames):
            if target.exists() and not source.exists() and source.parent.exists():
                os.rename(target, source)
        for path in self.folder.rglob("*"):
            if path.is_file() and path.stat().st_ino not in self.synced:
                os.truncate(path, path.stat().st_size // 2)


class KilledAt(TrainerCallback):
    """Kills the process as an event comes for the n-th time; of all events where none is named."""

    def __init__(self, at, event=None):
        self.at, self.event, self.count = at, event, 0

    def _came(self, event):
        if self.event in (None, event):
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1


for _event in ("step_begin", "substep_end", "pre_optimizer_step", "optimizer_step", "step_end", "log", "save"):
    setattr(KilledAt, f"on_{_event}", lambda self, *args, event=_event, **kwargs: self._came(event))
for _event in ("epoch_begin", "epoch_end", "train_begin", "train_end"):
    setattr(KilledAt, f"on_{_event}", lambda self, *args, event=_event, **kwargs: self._came(event))
