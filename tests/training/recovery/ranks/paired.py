"""Trainings of several ranks: forked processes with the environment that torchrun gives, over gloo, ended in time."""

import os
import signal
import socket
import sys
import time
import traceback

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from tests.training.recovery.forked import own_locks


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Ranks:
    """What became of the ranks of a training.

    Attributes:
        codes: exit codes, or the signals that ended them, negative; None where a rank had to be killed after the time.
        seconds: until each ended.
        said: what each returned; None where it did not.
        wrote: what each wrote to its standard error.
    """

    def __init__(self, folder, count):
        self.codes, self.seconds = [None] * count, [None] * count
        self._folder = folder

    def _load(self, rank):
        path = self._folder / f"said-{rank}"
        return torch.load(path, weights_only=False) if path.exists() else None

    @property
    def said(self):
        return [self._load(rank) for rank in range(len(self.codes))]

    @property
    def wrote(self):
        return [(self._folder / f"wrote-{rank}").read_text() for rank in range(len(self.codes))]


def together(folder, work, count=2, most_seconds=40):
    """Runs `work(rank)` in so many ranks, and kills what is left of them after the time."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("said-*"):
        left.unlink()
    port, begun = free_port(), time.monotonic()
    children = [_fork(folder, work, rank, count, port) for rank in range(count)]
    ranks = Ranks(folder, count)
    while None in ranks.codes and time.monotonic() - begun < most_seconds:
        for rank, child in enumerate(children):
            if ranks.codes[rank] is None:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    ranks.codes[rank] = os.waitstatus_to_exitcode(status)
                    ranks.seconds[rank] = time.monotonic() - begun
        time.sleep(0.01)
    for rank, child in enumerate(children):
        if ranks.codes[rank] is None:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return ranks


def _fork(folder, work, rank, count, port):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        written = os.open(folder / f"wrote-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(written, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        torch.set_num_threads(1)
        own_locks()
        about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
        about |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GLOO_SOCKET_IFNAME": "lo"}
        os.environ.update({name: str(value) for name, value in about.items()})
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        GradientState._reset_state()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        said = work(rank)
        torch.save(said, folder / f"said-{rank}")
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
