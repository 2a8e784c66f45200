"""Finding and ending processes. Linux sees all descendants; elsewhere those that kept their parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable

import psutil

MARK = "AUTOFIT_SANDBOX"

_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> bool:
    """From now on orphaned descendants become children of this process, daemons included. False where not had."""
    if not sys.platform.startswith("linux"):
        return False
    return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def descendants(pid: int | None = None) -> list[psutil.Process]:
    """All descendants of a process (default: this one), zombies included: their other threads may still run."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return []


def alive(process: psutil.Process) -> bool:
    """Whether it runs and is not a zombie. A pid that was reused is another process."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kills each that is still the process it was."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def kill_group(pid: int, number: int) -> None:
    """Signals a process group; one that is gone is fine. The leader must not have been reaped (its id is reused)."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def end_descendants(spare: set[int], settle_seconds: float = 0.2, limit_seconds: float = 5.0) -> int:
    """Kills and reaps every descendant of this process except the spared; returns how many had not ended themselves.

    One that is killed but not reaped may still hold the card's memory, so this waits until all are reaped.

    Helpers that end with their parent (a resource tracker) get `settle_seconds` to do so. Gives up after
    `limit_seconds`: a process in an uninterruptible call dies when the call returns.
    """
    begun = time.monotonic()
    killed: set[int] = set()
    while True:
        reap()
        left = [process for process in descendants() if process.pid not in spare]
        elapsed = time.monotonic() - begun
        if not left or elapsed > limit_seconds:
            return len(killed)
        if elapsed >= settle_seconds:
            killed.update(process.pid for process in left if alive(process))
            kill(left)
        time.sleep(0.01)


def reap() -> None:
    """Collects the zombies among our children."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def marked(mark: str) -> list[psutil.Process]:
    """Processes that carry this mark in the environment they were started with: forks of a marked one do too."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if mark in process.environ().get(MARK, "").split(":") and alive(process):
                found.append(process)
    return found


def sweep(mark: str, limit_seconds: float = 3.0) -> int:
    """Kills whatever carries the mark, except this process; returns how many there were."""
    end = time.monotonic() + limit_seconds
    killed: set[int] = set()
    while time.monotonic() < end:
        left = [process for process in marked(mark) if process.pid != os.getpid()]
        if not left:
            break
        killed.update(process.pid for process in left)
        kill(left)
        time.sleep(0.02)
    return len(killed)


def die() -> None:
    """Ends this process and its descendants at once, without any clean-up."""
    end = time.monotonic() + 1.0
    while time.monotonic() < end and (left := [process for process in descendants() if alive(process)]):
        kill(left)
    if hasattr(signal, "SIGKILL"):
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(1)
