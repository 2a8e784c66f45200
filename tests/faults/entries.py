"""Functions that the tests run in child processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def kill_self(request, report):
    report("optimizer")
    os.kill(os.getpid(), request["signal"])
    time.sleep(60)


def segfault(request, report):
    import ctypes

    ctypes.string_at(0)


def hang(request, report):
    if request.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if request.get("pid_file"):
        Path(request["pid_file"]).write_text(str(os.getpid()))
    report("forward")
    while True:
        time.sleep(60)


def save_on_sigterm(request, report):
    """What the training child does: it saves, then returns."""
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    report("train")
    while not told:
        time.sleep(0.01)
    time.sleep(request["save_seconds"])
    Path(request["file"]).write_text("saved")
    return {"saved": True}


def daemon(request, report):
    """Leaves a daemon behind: a fork of a fork in a session of its own, and a program in another."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            Path(request["folder"], "daemon.pid").write_text(str(os.getpid()))
            while True:
                time.sleep(60)
        os._exit(0)
    program = subprocess.Popen(["sleep", "600"], start_new_session=True)
    Path(request["folder"], "program.pid").write_text(str(program.pid))
    while not Path(request["folder"], "daemon.pid").exists():
        time.sleep(0.01)
    if request.get("hang"):
        hang({**request, "pid_file": request["folder"] + "/child.pid"}, report)
    return {}


def flood(request, report):
    chunk = b"x" * 2**20
    for fd in (1, 2):
        for _ in range(request["megabytes"] // 2):
            os.write(fd, chunk)
    sys.stderr.write("\nlast words\n")
    return {}


def eat_memory(request, report):
    """At most 1 GiB, in case that nothing stops it."""
    hoard = []
    for number in range(64):
        hoard.append(bytearray(os.urandom(1) * (16 * 2**20)))
        report("forward", megabytes=16 * number)
    return {}


def echo(request, report):
    report("forward", live_bytes=7)
    return {"echo": request}


def close_descriptors(request, report):
    """As libraries that daemonise do; then others take the numbers."""
    os.closerange(3, 256)
    for _ in range(8):
        os.close(os.pipe()[1])
    time.sleep(0.2)
    return {"lived": True}
