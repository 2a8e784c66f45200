"""A fresh interpreter for each job, where there is no fork (Windows): threads drain, psutil ends.

A descendant that lost its parent before the job ended is not seen here; elsewhere `supervise` sees it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import psutil

from autofit.trial import files, processes
from autofit.trial.job import Ended, Job

POLL_SECONDS = 0.2
TAIL_BYTES = 64 * 2**10
DEADLINE_GRACE_SECONDS = 1.0


class _Drain(threading.Thread):
    """Reads a pipe to its end and keeps the last 64 KiB."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self.kept = bytearray()
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while chunk := os.read(self._stream.fileno(), TAIL_BYTES):
                self.kept += chunk
                del self.kept[:-TAIL_BYTES]


class PortableRunner:
    """Same jobs, same `Ended`, as `ServerClient`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._drains: list[_Drain] = []
        self._begun = 0.0
        self._folder = Path()

    def alive(self) -> bool:
        """There is no server that could die."""
        return True

    def run(self, job: Job, poll: Callable[[], None]) -> Ended:
        """As `ServerClient.run`. Raises what `poll` raises; call `stop` then."""
        self._start(job)
        end = None if job.deadline_seconds is None else self._begun + job.deadline_seconds
        assert self._process is not None
        while not _ended_within(self._process, POLL_SECONDS):
            if end is not None and time.monotonic() >= end:
                return self._finish(DEADLINE_GRACE_SECONDS, timed_out=True)
            poll()
        return self._finish(0)

    def stop(self, grace_seconds: float) -> Ended:
        """Ends the running job; interrupted meanwhile, at once."""
        try:
            return self._finish(grace_seconds, interrupted=True)
        except KeyboardInterrupt:
            return self._finish(0, interrupted=True)

    def close(self) -> None:
        """Ends whatever runs."""
        if self._process is not None:
            self._finish(0, interrupted=True)

    def _start(self, job: Job) -> None:
        folder = self._folder = job.folder.resolve()
        asked = {"folder": str(folder), "sys_path": [p or os.getcwd() for p in sys.path], "parent": os.getpid()}
        home = str(Path(__file__).resolve().parents[2])
        paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "autofit.trial.worker", json.dumps(asked)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._drains = [_Drain(self._process.stdout), _Drain(self._process.stderr)]
        self._begun = time.monotonic()

    def _finish(self, grace_seconds: float, *, timed_out: bool = False, interrupted: bool = False) -> Ended:
        process = self._process
        if process is None:
            return Ended(interrupted=interrupted)
        family = processes.descendants(process.pid)
        if process.poll() is None:
            process.terminate()  # on Windows this is the hard end already
            if not _ended_within(process, grace_seconds):
                family += processes.descendants(process.pid)
                process.kill()
        code = process.wait()
        leftover = {member.pid for member in family if processes.alive(member)}
        processes.kill(family)
        psutil.wait_procs(family, timeout=5.0)
        for drain in self._drains:
            drain.join(1.0)
        self._process = None
        return self._ended(code, len(leftover), timed_out, interrupted)

    def _ended(self, code: int, leftover: int, timed_out: bool, interrupted: bool) -> Ended:
        tails = [bytes(drain.kept) for drain in self._drains]
        with contextlib.suppress(OSError):
            for name, tail in zip((files.STDOUT_TAIL, files.STDERR_TAIL), tails, strict=True):
                files.write_bytes(self._folder / name, tail, durable=False)
        return Ended(
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            timed_out=timed_out,
            interrupted=interrupted,
            stderr_tail=tails[1].decode("utf-8", "replace"),
            seconds=time.monotonic() - self._begun,
            leftover_processes=leftover,
        )


def _ended_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
