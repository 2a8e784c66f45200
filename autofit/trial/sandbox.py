"""Runs a function in a child process and turns whatever happens into a value. Imports nothing heavy."""

from __future__ import annotations

import json
import os
from types import TracebackType
from typing import Any, Literal, Protocol

from autofit.trial import cgroup, files
from autofit.trial.client import Poll, ServerClient, ServerDied, Unfit
from autofit.trial.job import Ended, Job, Outcome
from autofit.trial.phases import START
from autofit.trial.portable import PortableRunner
from autofit.trial.preload import HEAVY_STACK

__all__ = ["HEAVY_STACK", "Job", "Outcome", "Sandbox"]

StartMethod = Literal["fork", "spawn"]


class _Runner(Protocol):
    def alive(self) -> bool: ...

    def run(self, job: Job, poll: Poll) -> Ended: ...

    def stop(self, grace_seconds: float) -> Ended: ...

    def close(self) -> None: ...


class Sandbox:
    """One preloaded fork server, started with the first job (or `start`) and again where it died.

    With "spawn" (and where there is no fork, or the imports would start CUDA) each job is a fresh interpreter that
    imports by itself. One job at a time; not to be shared by threads. A context manager.

    Attributes:
        start_method: what is in use; None until it is known.
        notes: why it is not what was asked for; what could not be preloaded.
        last_outcome: of the last job, also where `run` raised because it was interrupted.
    """

    def __init__(self, preload: tuple[str, ...] = HEAVY_STACK, start_method: StartMethod | None = None) -> None:
        self._preload = preload
        self._runner: _Runner | None = None
        self._pid = os.getpid()
        self.start_method = start_method if hasattr(os, "fork") else "spawn"
        self.notes: list[str] = []
        self.last_outcome: Outcome | None = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, poll: Poll | None = None) -> None:
        """Starts the server and waits until it has imported; `run` does this by itself."""
        self._started(poll or _nothing)

    def run(self, job: Job, poll: Poll | None = None) -> Outcome:
        """Runs a job to its end; `poll` is called about five times a second meanwhile.

        Raises:
            KeyboardInterrupt, or what `poll` raises: the child gets SIGTERM and `job.grace_seconds`; when everything
                has ended (see `last_outcome`) it is raised again. A second Ctrl-C ends the child at once.
            OSError: the job's folder cannot be made or written.
            TypeError, ValueError: the request is not JSON.
        """
        poll = poll or _nothing
        _prepare(job)
        runner = self._started(poll)
        kills = cgroup.oom_kills()
        try:
            ended = runner.run(job, poll)
        except ServerDied as error:
            self._runner = None
            ended = Ended(note=str(error))
        except BaseException:
            self.last_outcome = _outcome(job, self._stop(runner, job.grace_seconds), kills)
            raise
        self.last_outcome = _outcome(job, ended, kills)
        return self.last_outcome

    def close(self) -> None:
        """Ends the server, and with it whatever runs. A closed sandbox starts again when it is used."""
        runner, self._runner = self._runner, None
        if runner is not None and os.getpid() == self._pid:  # a fork of the controller does not own the server
            runner.close()

    def _stop(self, runner: _Runner, grace_seconds: float) -> Ended:
        try:
            return runner.stop(grace_seconds)
        except ServerDied as error:
            self._runner = None
            return Ended(interrupted=True, note=str(error))
        except BaseException:
            self.close()
            raise

    def _started(self, poll: Poll) -> _Runner:
        if self._runner is not None and not self._runner.alive():
            self.close()
        if self._runner is None:
            self._runner = PortableRunner() if not hasattr(os, "fork") else self._start_server(poll)
        return self._runner

    def _start_server(self, poll: Poll) -> ServerClient:
        fork = self.start_method != "spawn"
        client = ServerClient(self._preload if fork else (), fork=fork)
        try:
            client.wait_ready(poll)
        except (Unfit, ServerDied, TimeoutError) as error:
            client.kill()
            if not fork:
                raise
            self.notes.append(f"a fresh interpreter for each trial, since {error}")
            self.start_method = "spawn"
            return self._start_server(poll)
        except BaseException:
            client.kill()  # it would not listen before its imports are done
            raise
        self.start_method = "fork" if fork else "spawn"
        self.notes += client.failures
        return client


def _nothing() -> None:
    pass


def _prepare(job: Job) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    for name in (files.RESULT, files.PHASE, files.STDOUT_TAIL, files.STDERR_TAIL):
        (job.folder / name).unlink(missing_ok=True)
    request = {"entry": job.entry, "request": job.request, "env": dict(job.env), "cwd": os.getcwd()}
    json.dumps(request)  # raise before anything is on disk
    files.write_json(job.folder / files.REQUEST, request)


def _outcome(job: Job, ended: Ended, kills_before: dict[str, int]) -> Outcome:
    left = files.read_json(job.folder / files.RESULT) or {}
    record: dict[str, Any] = files.read_json(job.folder / files.PHASE) or {}
    result, error = left.get("result"), left.get("error")
    return Outcome(
        result=result if isinstance(result, dict) else None,
        error=error if isinstance(error, dict) else None,
        phase=str(record.get("phase", START)),
        phase_record=record,
        exit_code=ended.exit_code,
        signal=ended.signal,
        timed_out=ended.timed_out,
        interrupted=ended.interrupted,
        host_oom_kill=cgroup.grew(kills_before, cgroup.oom_kills()),
        stderr_tail=ended.stderr_tail,
        seconds=ended.seconds,
        leftover_processes=ended.leftover_processes,
        note=ended.note,
    )
