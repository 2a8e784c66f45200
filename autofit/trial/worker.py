"""The inside of a child process: calls the entry, leaves its result or its exception on disk.

Forked from the preloaded server, or run as `python -m autofit.trial.worker` where that cannot be.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from autofit.trial import files, processes
from autofit.trial.phases import PhaseReport
from autofit.trial.record import describe_exception

EXIT_RAISED = 1

# Where host memory runs out, the trial should die, not the one who watches it.
_OOM_SCORE_ADJ = "300"


class EntryError(Exception):
    """The entry cannot be found, or what it returned cannot be handed back."""


def run_job(folder: Path) -> int:
    """Runs the request in a folder; returns the exit code. Never raises: what the entry raises is on disk then."""
    code = 0
    try:
        asked = files.read_json(folder / files.REQUEST)
        if asked is None:
            raise EntryError(f"{folder / files.REQUEST} is missing or not JSON")
        os.chdir(asked["cwd"])  # the server's may be older than the controller's
        os.environ.update(asked["env"])
        function = resolve(asked["entry"])
        result = function(asked["request"], PhaseReport(folder / files.PHASE))
        files.write_bytes(folder / files.RESULT, encode_result(result))
    except BaseException as error:
        code = _record_failure(folder, error)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    return code


def resolve(entry: str) -> Callable[[dict[str, Any], PhaseReport], Any]:
    """The function that "package.module:function" names.

    Raises:
        EntryError: no such module, function, or not of this form.
        Exception: whatever importing the module raises.
    """
    module_name, _, name = entry.partition(":")
    if not module_name or not name:
        raise EntryError(f"{entry!r} is not of the form package.module:function")
    found = getattr(importlib.import_module(module_name), name, None)
    if not callable(found):
        raise EntryError(f"{module_name} has no function {name}")
    return found


def encode_result(result: Any) -> bytes:
    """`{"result": …}` as JSON.

    Raises:
        EntryError: not a dict, not JSON, or larger than 16 MiB.
    """
    if not isinstance(result, dict):
        raise EntryError(f"the entry returned {type(result).__name__}, not a dict")
    try:
        data = json.dumps({"result": result}).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise EntryError(f"the entry's result is not JSON: {error}") from None
    if len(data) > files.MAX_JSON_BYTES:
        raise EntryError(f"the entry's result takes {len(data)} bytes as JSON; the limit is {files.MAX_JSON_BYTES}")
    return data


def _record_failure(folder: Path, error: BaseException) -> int:
    described = describe_exception(error)
    with contextlib.suppress(Exception):
        files.write_bytes(folder / files.RESULT, json.dumps({"error": described}).encode())
    if isinstance(error, SystemExit):
        # On record as well: exit(1) called in C by a library leaves none, and that is how the two are told apart.
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return EXIT_RAISED
    with contextlib.suppress(Exception):
        traceback.print_exception(error)
    return EXIT_RAISED


def prepare_process() -> None:
    """Own habits of a child, after it has its session and its streams."""
    processes.become_subreaper()
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE_ADJ)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    # Not via sys.stderr: that may be a stream inherited from the server.
    with contextlib.suppress(OSError, ValueError):
        faulthandler.enable(file=2)


def watch_parents(pipes: list[int]) -> None:
    """Ends this process, and all that it started, as soon as one of these pipes closes at its other end.

    Each pipe has its only write end in a process that must not die before this one. Unlike PDEATHSIG this does not
    depend on the thread that forked, and it takes the descendants along.
    """
    poll = select.poll()
    for fd in pipes:
        poll.register(fd, 0)  # only hang-ups and errors, which are always told
    known = {fd: os.fstat(fd).st_ino for fd in pipes}

    def closed(fd: int, event: int) -> bool:
        """False where the entry itself closed the descriptor, or then got it again for something else."""
        try:
            return not event & select.POLLNVAL and os.fstat(fd).st_ino == known[fd]
        except OSError:
            return False

    def watch() -> None:
        while True:
            for fd, event in poll.poll():
                if closed(fd, event):
                    processes.die()
                poll.unregister(fd)

    threading.Thread(target=watch, name="autofit-watch-parents", daemon=True).start()


def watch_process(pid: int) -> None:
    """As `watch_parents`, where pipes cannot be handed down: looks once a second whether that process still runs."""
    parent = psutil.Process(pid)

    def watch() -> None:
        while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1.0)
        processes.die()

    threading.Thread(target=watch, name="autofit-watch-parent", daemon=True).start()


def main(argv: list[str]) -> None:
    """A fresh interpreter's entry point; argv[0] is {"folder", "sys_path"} and "pipes" or "parent" as JSON."""
    asked = json.loads(argv[0])
    sys.path[:] = asked["sys_path"]
    prepare_process()
    if "pipes" in asked:
        watch_parents(asked["pipes"])
    else:
        with contextlib.suppress(psutil.Error):
            watch_process(asked["parent"])
    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    code = run_job(Path(asked["folder"]))
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
