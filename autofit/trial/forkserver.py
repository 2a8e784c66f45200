"""A process that imports once and forks a child for each job: `python -m autofit.trial.forkserver` (POSIX).

It has one thread and never runs a tensor operation: a child forked after a parallel operation hangs in its first.
Lines of JSON on a socket, the controller's first:

    {"preload": [...], "sys_path": [...], "fork": true}   → {"ready": true, "failures": [...]}, or {"unfit": why}
    {"run": id, "folder": ..., "deadline_seconds": ...}   → {"started": id, "pid": ...}, {"ended": id, "how": Ended}
    {"stop": id, "grace_seconds": ...}                    → SIGTERM, then SIGKILL after the grace

The controller's end closing ends the job, whatever it started, and the server.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autofit.trial import processes
from autofit.trial.job import Ended
from autofit.trial.preload import preload, why_unfit_to_fork
from autofit.trial.supervise import Child, Spec, start_forked, start_spawned, supervise


class _Gone(Exception):
    """The controller is no more."""


class Server:
    """See the module. `life` is the read end of a pipe whose only write end the controller holds."""

    def __init__(self, control: socket.socket, life: int, controller_pid: int) -> None:
        self._control = control
        self._life = life
        self._controller_pid = controller_pid
        self._buffer = b""
        self._messages: list[dict[str, Any]] = []
        self._child: Child | None = None
        self._job = -1
        self._last_ended: dict[str, Any] | None = None
        self._told_to_end = False
        self._wakeup, self._wakeup_write = os.pipe()
        self._own: set[int] = set()
        self._fork = True
        self._sys_path: list[str] = []

    def serve(self) -> None:
        """Until the controller is gone."""
        self._control.setblocking(False)
        self._catch_signals()
        processes.become_subreaper()
        with contextlib.suppress(_Gone):
            self._set_up(self._next_message())
            while True:
                message = self._next_message()
                if "run" in message:
                    self._run(message)
                elif "stop" in message:
                    self._answer_late_stop(message["stop"])
        processes.end_descendants(set(), settle_seconds=0)

    def _catch_signals(self) -> None:
        os.set_blocking(self._wakeup, False)
        os.set_blocking(self._wakeup_write, False)
        signal.set_wakeup_fd(self._wakeup_write, warn_on_full_buffer=False)

        def end(*_: object) -> None:
            self._told_to_end = True

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGHUP, end)
        # The terminal's Ctrl-C is the controller's affair. (A handler, since "ignore" would be inherited by exec.)
        for number in (signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)

    def _set_up(self, message: dict[str, Any]) -> None:
        sys.path[:] = self._sys_path = message["sys_path"]
        self._fork = message["fork"]
        failures = preload(message["preload"], lambda: not self._orphaned()) if self._fork else []
        if unfit := why_unfit_to_fork() if self._fork else None:
            self._send({"unfit": unfit})
            raise _Gone
        # What an import started belongs to the server, not to a job.
        self._own = {process.pid for process in processes.descendants()}
        self._send({"ready": True, "failures": failures})

    def _run(self, message: dict[str, Any]) -> None:
        self._job, self._last_ended = message["run"], None
        spec = Spec(
            folder=Path(message["folder"]),
            deadline_seconds=message["deadline_seconds"],
            pipes=(self._life,),
            sys_path=self._sys_path,
        )
        try:
            self._child, alive = start_forked(spec, self._close_in_child) if self._fork else start_spawned(spec)
        except OSError as error:
            self._send_ended(Ended(note=f"no child process could be started: {error}"))
            return
        try:
            self._send({"started": self._job, "pid": self._child.pid})
            ended = supervise(
                self._child, self._control.fileno(), self._wakeup, self._on_control, self._orphaned, self._own
            )
        finally:
            os.close(alive)
            self._child = None
        self._send_ended(ended)

    def _answer_late_stop(self, job: int) -> None:
        """The controller was interrupted before it had asked for the job, or while it read how it ended."""
        if self._last_ended is not None and self._last_ended["ended"] == job:
            self._send(self._last_ended)
        else:
            self._send({"ended": job, "how": asdict(Ended(interrupted=True, note="interrupted before it began"))})

    def _send_ended(self, ended: Ended) -> None:
        self._last_ended = {"ended": self._job, "how": asdict(ended)}
        self._send(self._last_ended)

    def _close_in_child(self) -> None:
        self._control.close()
        os.close(self._wakeup)
        os.close(self._wakeup_write)

    def _orphaned(self) -> bool:
        # The pipe alone would not do where the controller forked a worker that holds its ends too.
        return self._told_to_end or os.getppid() != self._controller_pid

    def _on_control(self) -> bool:
        """Takes what the controller says while a child runs; False once it is gone."""
        try:
            self._receive()
        except _Gone:
            return False
        messages, self._messages = self._messages, []
        for message in messages:
            if message.get("stop") == self._job and self._child is not None:
                self._child.stop(message["grace_seconds"])
        return True

    def _receive(self) -> None:
        try:
            data = self._control.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            raise _Gone
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        self._messages += [json.loads(line) for line in lines]

    def _next_message(self) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._wakeup, selectors.EVENT_READ)
            while not self._messages:
                if self._orphaned():
                    raise _Gone
                for key, _ in selector.select(0.5):
                    if key.fd == self._wakeup:
                        with contextlib.suppress(BlockingIOError):
                            os.read(self._wakeup, 4096)
                    else:
                        self._receive()
        return self._messages.pop(0)

    def _send(self, message: dict[str, Any]) -> None:
        self._control.setblocking(True)
        try:
            self._control.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            raise _Gone from None
        finally:
            self._control.setblocking(False)


def _streams_for_children() -> None:
    """Makes sys.stdout and sys.stderr anew, fit for a child in which their descriptors become pipes.

    Whoever imports something keeps references to them (logging handlers), so the child must not replace them; and
    Python seeks on a stream whose descriptor was a file, or /dev/null, when it was made.
    """
    reader, writer = os.pipe()
    for name, fd in (("stdout", 1), ("stderr", 2)):
        genuine = os.dup(fd)
        os.dup2(writer, fd)
        stream = open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
        os.dup2(genuine, fd)
        os.close(genuine)
    os.close(reader)
    os.close(writer)


def main(argv: list[str]) -> None:
    """argv: the control socket's and the life pipe's descriptors, and the controller's process id."""
    control, life, controller_pid = (int(word) for word in argv)
    server = Server(socket.socket(fileno=control), life, controller_pid)
    os.set_inheritable(life, True)
    _streams_for_children()
    server.serve()
    os._exit(0)  # nothing of what was imported needs to be taken down


if __name__ == "__main__":
    main(sys.argv[1:])
