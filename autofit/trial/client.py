"""The controller's end of the fork server (POSIX)."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from autofit.errors import AutofitError
from autofit.trial import processes
from autofit.trial.job import Ended, Job

POLL_SECONDS = 0.2
PRELOAD_LIMIT_SECONDS = 300.0
# What the server needs, beyond a grace, to end a stubborn job and say so.
ENDING_SECONDS = 15.0

Poll = Callable[[], None]


class ServerDied(AutofitError):
    """The server is no more; the text says how it ended."""


class Unfit(Exception):
    """The server must not be forked (CUDA started during its imports); the text says why."""


class ServerClient:
    """One running server, one job at a time."""

    def __init__(self, preload: tuple[str, ...], *, fork: bool) -> None:
        """Starts the process; `wait_ready` waits for its imports."""
        self.fork = fork
        self.failures: list[str] = []
        self._mark = uuid.uuid4().hex
        self._jobs = 0
        self._buffer = b""
        self._messages: list[dict[str, Any]] = []
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._control, theirs = socket.socketpair()
        life, self._life = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "autofit.trial.forkserver", *map(str, (theirs.fileno(), life, os.getpid()))],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=self._environment(),
                pass_fds=(theirs.fileno(), life),
                start_new_session=True,
            )
        except BaseException:
            self._control.close()
            os.close(self._life)
            self._log.close()
            raise
        finally:
            theirs.close()
            os.close(life)
        with contextlib.suppress(OSError):  # its death is noticed when it is waited for
            self._send({"preload": preload, "sys_path": [p or os.getcwd() for p in sys.path], "fork": fork})

    def _environment(self) -> dict[str, str]:
        outer = os.environ.get(processes.MARK)
        home = str(Path(__file__).resolve().parents[2])
        paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **os.environ,
            processes.MARK: f"{outer}:{self._mark}" if outer else self._mark,
            "PYTHONPATH": os.pathsep.join(paths),
            # The tokenizers library otherwise warns, and turns itself off, in every fork.
            "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "false"),
        }

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def wait_ready(self, poll: Poll) -> None:
        """Waits for the imports.

        Raises:
            Unfit, ServerDied: as they say. TimeoutError: the imports hang.
        """
        end = time.monotonic() + PRELOAD_LIMIT_SECONDS
        while time.monotonic() < end:
            message = self._receive(POLL_SECONDS)
            if message is not None and "unfit" in message:
                raise Unfit(message["unfit"])
            if message is not None:
                self.failures = message["failures"]
                return
            poll()
        raise TimeoutError(f"the imports of the trial server take more than {PRELOAD_LIMIT_SECONDS:.0f} s")

    def run(self, job: Job, poll: Poll) -> Ended:
        """Runs a job whose request is on disk.

        Raises:
            ServerDied: whatever the job had started is ended first.
            BaseException: what `poll` raises, or KeyboardInterrupt; the job is then ended, gently at first.
        """
        self._jobs += 1
        self._send({"run": self._jobs, "folder": str(job.folder.resolve()), "deadline_seconds": job.deadline_seconds})
        while True:
            ended = self._ended(POLL_SECONDS)
            if ended is not None:
                return ended
            poll()

    def stop(self, grace_seconds: float) -> Ended:
        """Ends the running job: SIGTERM, then SIGKILL after the grace; interrupted meanwhile, SIGKILL at once.

        Raises:
            ServerDied: the server did not survive it, or did not answer; all of it is gone then.
        """
        try:
            return self._stop(grace_seconds)
        except KeyboardInterrupt:
            return self._stop(0)

    def _stop(self, grace_seconds: float) -> Ended:
        self._send({"stop": self._jobs, "grace_seconds": grace_seconds})
        end = time.monotonic() + grace_seconds + ENDING_SECONDS
        while time.monotonic() < end:
            ended = self._ended(POLL_SECONDS)
            if ended is not None:
                return ended
        self.kill()
        raise ServerDied("the trial server did not answer and was killed")

    def _ended(self, timeout_seconds: float) -> Ended | None:
        message = self._receive(timeout_seconds)
        if message is not None and message.get("ended") == self._jobs:
            return Ended(**message["how"])
        return None

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._control.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            raise self._died() from None

    def _receive(self, timeout_seconds: float) -> dict[str, Any] | None:
        """The next message, or None when the time is up."""
        if not self._messages:
            if not select.select([self._control], [], [], timeout_seconds)[0]:
                return None
            try:
                data = self._control.recv(65536)
            except OSError:
                data = b""
            if not data:
                raise self._died()
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            self._messages += [json.loads(line) for line in lines]
        return self._messages.pop(0) if self._messages else None

    def _died(self) -> ServerDied:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2.0)
        code = self._process.poll()
        how = "closed its socket" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
        text = f"the trial server ended ({how})"
        last = self._log_tail().strip().splitlines()[-1:]
        self.kill()
        return ServerDied(": ".join([text, *last]))

    def _log_tail(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            size = self._log.seek(0, os.SEEK_END)
            self._log.seek(max(0, size - 4096))
            return self._log.read().decode("utf-8", "replace")
        return ""

    def close(self) -> None:
        """Ends the server and whatever runs in it."""
        self._control.close()
        try:
            self._process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self.kill()

    def kill(self) -> None:
        """Ends the server without asking it, then everything that carries its mark."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
        if self._life >= 0:
            # The child watches this pipe, and ends itself and its own.
            os.close(self._life)
            self._life = -1
            processes.sweep(self._mark)
        self._control.close()
        self._log.close()
