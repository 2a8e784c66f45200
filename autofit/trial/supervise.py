"""One child process from its start until nothing is left of it, as its single-threaded parent sees it (POSIX)."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from autofit.trial import files, processes, worker
from autofit.trial.job import Ended

TAIL_BYTES = 64 * 2**10
DEADLINE_GRACE_SECONDS = 1.0
KILL_AGAIN_SECONDS = 0.5
TICK_SECONDS = 0.5

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP)


@dataclass
class Tail:
    """A pipe that is always drained and of which only the end is kept."""

    fd: int
    kept: bytearray = field(default_factory=bytearray)
    open: bool = True

    def drain(self) -> None:
        """Reads what is there now, at most 1 MiB."""
        for _ in range(16):
            try:
                chunk = os.read(self.fd, TAIL_BYTES)
            except BlockingIOError:
                return
            except OSError:
                chunk = b""
            if not chunk:
                self.open = False
                return
            self.kept += chunk
            del self.kept[:-TAIL_BYTES]

    def text(self) -> str:
        """The end of the stream; bytes that are no UTF-8 are replaced."""
        return self.kept.decode("utf-8", "replace")


class Child:
    """A started job.

    Attributes:
        pid: of the child, leader of its own session.
    """

    def __init__(self, pid: int, stdout: int, stderr: int, folder: Path, deadline_seconds: float | None) -> None:
        self.pid = pid
        self.folder = folder
        self.stdout, self.stderr = Tail(stdout), Tail(stderr)
        self._begun = time.monotonic()
        self._deadline = None if deadline_seconds is None else self._begun + deadline_seconds
        self._kill_at: float | None = None
        self.timed_out = self.interrupted = False

    def stop(self, grace_seconds: float) -> None:
        """SIGTERM now, SIGKILL to all of it after the grace. Asked again, the earlier SIGKILL holds."""
        self.interrupted = True
        self._terminate(grace_seconds)

    def _terminate(self, grace_seconds: float) -> None:
        if self._kill_at is None:
            _send(self.pid, signal.SIGTERM)
        kill_at = time.monotonic() + grace_seconds
        self._kill_at = kill_at if self._kill_at is None else min(kill_at, self._kill_at)

    def tick(self, spare: set[int]) -> None:
        """Whatever is due by the clock."""
        now = time.monotonic()
        if self._deadline is not None and now >= self._deadline and self._kill_at is None:
            self.timed_out = True
            self._terminate(DEADLINE_GRACE_SECONDS)
        if self._kill_at is not None and now >= self._kill_at:
            processes.kill_group(self.pid, signal.SIGKILL)
            processes.kill(p for p in processes.descendants() if p.pid not in spare)
            self._kill_at = now + KILL_AGAIN_SECONDS

    def wait_seconds(self) -> float:
        """Until the clock makes something due; at most a tick."""
        due = [at for at in (self._deadline if self._kill_at is None else None, self._kill_at) if at is not None]
        return max(0.0, min([TICK_SECONDS, *(at - time.monotonic() for at in due)]))

    def has_ended(self) -> bool:
        """Whether the child itself is over. It is left a zombie, so that its id is not given away."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def finish(self, spare: set[int]) -> Ended:
        """Reaps the child, ends what is left of it and says how it went."""
        if not sys.platform.startswith("linux"):
            processes.kill_group(self.pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        leftover = processes.end_descendants(spare)
        for tail in (self.stdout, self.stderr):
            tail.drain()
            os.close(tail.fd)
        self._save_tails()
        return Ended(
            exit_code=status if status >= 0 else None,
            signal=-status if status < 0 else None,
            timed_out=self.timed_out,
            interrupted=self.interrupted,
            stderr_tail=self.stderr.text(),
            seconds=time.monotonic() - self._begun,
            leftover_processes=leftover,
        )

    def _save_tails(self) -> None:
        with contextlib.suppress(OSError):  # a full disk, or a folder that somebody removed
            files.write_bytes(self.folder / files.STDERR_TAIL, bytes(self.stderr.kept), durable=False)
            files.write_bytes(self.folder / files.STDOUT_TAIL, bytes(self.stdout.kept), durable=False)


def _send(pid: int, number: int) -> None:
    """Signals one process; one that is gone is fine."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What the server was asked to start. `pipes`: what the child watches, besides the pipe to the server."""

    folder: Path
    deadline_seconds: float | None
    pipes: tuple[int, ...]
    sys_path: list[str]


def start_forked(spec: Spec, close_in_child: Callable[[], None]) -> tuple[Child, int]:
    """Forks a child that has all of this process's imports; returns it and the pipe that it watches us by.

    `close_in_child` closes, in the child, whatever belongs to the server.
    """
    stdout, stderr, alive = os.pipe(), os.pipe(), os.pipe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    gc.freeze()  # the collector would touch, and so copy, every inherited page
    # Until the child has its own handlers, a signal must wait: the server's would swallow it.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    pid = os.fork()
    if pid == 0:
        try:
            for fd in (stdout[0], stderr[0], alive[1]):
                os.close(fd)
            close_in_child()
            _become_child(stdout[1], stderr[1])
            worker.watch_parents([*spec.pipes, alive[0]])
            os._exit(worker.run_job(spec.folder))
        except BaseException as error:
            os.write(2, f"autofit: the child could not be set up: {error!r}\n".encode())
        finally:
            os._exit(worker.EXIT_RAISED)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    for fd in (stdout[1], stderr[1], alive[0]):
        os.close(fd)
    return _child(pid, stdout[0], stderr[0], spec), alive[1]


def _become_child(stdout: int, stderr: int) -> None:
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (stdout, 1), (stderr, 2)):
        os.dup2(source, target)
        os.close(source)
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    gc.enable()
    worker.prepare_process()


def start_spawned(spec: Spec) -> tuple[Child, int]:
    """As `start_forked`, but a fresh interpreter that imports by itself."""
    alive = os.pipe()
    pipes = [*spec.pipes, alive[0]]
    asked = {"folder": str(spec.folder), "sys_path": spec.sys_path, "pipes": pipes}
    process = subprocess.Popen(
        [sys.executable, "-m", "autofit.trial.worker", json.dumps(asked)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        pass_fds=pipes,
    )
    os.close(alive[0])
    assert process.stdout is not None
    assert process.stderr is not None
    stdout, stderr = os.dup(process.stdout.fileno()), os.dup(process.stderr.fileno())
    process.stdout.close()
    process.stderr.close()
    process.returncode = 0  # we reap it ourselves; Popen is not to try
    return _child(process.pid, stdout, stderr, spec), alive[1]


def _child(pid: int, stdout: int, stderr: int, spec: Spec) -> Child:
    os.set_blocking(stdout, False)
    os.set_blocking(stderr, False)
    return Child(pid, stdout, stderr, spec.folder, spec.deadline_seconds)


def supervise(
    child: Child,
    control: int,
    wakeup: int,
    on_control: Callable[[], bool],
    orphaned: Callable[[], bool],
    spare: set[int],
) -> Ended:
    """Serves a child until it is over.

    Args:
        control: the file descriptor that `on_control` reads; it returns False once the controller is gone.
        wakeup: readable when a signal came (SIGCHLD).
        orphaned: whether the controller is gone, as far as the process table says.
        spare: descendants of ours that are no part of the job.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(wakeup, selectors.EVENT_READ)
        for tail in (child.stdout, child.stderr):
            selector.register(tail.fd, selectors.EVENT_READ)
        while not child.has_ended():
            for key, _ in selector.select(child.wait_seconds()):
                _serve(key.fd, child, selector, control, wakeup, on_control)
            if orphaned():
                child.stop(0)
            child.tick(spare)
    return child.finish(spare)


def _serve(
    fd: int, child: Child, selector: selectors.BaseSelector, control: int, wakeup: int, on_control: Callable[[], bool]
) -> None:
    if fd == wakeup:
        with contextlib.suppress(BlockingIOError):
            os.read(wakeup, 4096)
    elif fd == control:
        if not on_control():
            selector.unregister(control)
            child.stop(0)
    else:
        tail = child.stdout if fd == child.stdout.fd else child.stderr
        tail.drain()
        if not tail.open:
            selector.unregister(fd)
