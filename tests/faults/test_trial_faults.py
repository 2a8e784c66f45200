"""Trials that misbehave and processes that are killed: whatever happens, a value comes back and nobody is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from autofit.trial.classify import classify
from autofit.trial.result import TrialStatus
from autofit.trial.sandbox import Job, Sandbox

from . import entries

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="subreaper")

GONE_SECONDS = 5.0


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(preload=("json", entries.__name__)) as sandbox:
        sandbox.start()
        yield sandbox


@pytest.fixture
def job(tmp_path):
    def make(entry, deadline_seconds=20.0, grace_seconds=10.0, **request):
        return Job(
            entry=f"{entries.__name__}:{entry}",
            request={"folder": str(tmp_path), **request},
            folder=tmp_path / "job",
            deadline_seconds=deadline_seconds,
            grace_seconds=grace_seconds,
        )

    return make


def pid_in(path: Path, seconds: float = 10.0) -> psutil.Process:
    end = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path.name} did not come"
        time.sleep(0.01)
    return psutil.Process(int(path.read_text()))


def gone(processes: list[psutil.Process], seconds: float = GONE_SECONDS) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
            return True
        time.sleep(0.02)
    return False


class AtOnce:
    """A poll that does something to a running child, once its pid file is there."""

    def __init__(self, pid_file: Path, act) -> None:
        self.pid_file, self.act, self.child = pid_file, act, None

    def __call__(self) -> None:
        if self.child is None and self.pid_file.exists() and self.pid_file.read_text():
            self.child = psutil.Process(int(self.pid_file.read_text()))
            self.act()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_death_by_signal(sandbox, job, number):
    outcome = sandbox.run(job("kill_self", signal=int(number)))
    assert (outcome.signal, outcome.exit_code, outcome.phase) == (number, None, "optimizer")
    assert not outcome.timed_out
    assert classify(outcome)[0] is TrialStatus.CRASHED


def test_segmentation_fault_leaves_words(sandbox, job):
    outcome = sandbox.run(job("segfault"))
    assert outcome.signal == signal.SIGSEGV
    assert "Segmentation fault" in classify(outcome)[1]


@pytest.mark.parametrize("deaf", [False, True])
def test_hang_ends_at_the_deadline(sandbox, job, deaf):
    begun = time.monotonic()
    outcome = sandbox.run(job("hang", deadline_seconds=0.5, deaf=deaf))
    assert outcome.timed_out
    assert outcome.signal == (signal.SIGKILL if deaf else signal.SIGTERM)
    assert time.monotonic() - begun < 4
    assert classify(outcome)[0] is TrialStatus.TIMEOUT
    assert sandbox.run(job("echo")).result


@linux
@pytest.mark.parametrize("hang", [False, True])
def test_daemons_go_with_the_trial(sandbox, job, tmp_path, hang):
    outcome = sandbox.run(job("daemon", hang=hang, deadline_seconds=2.0 if hang else 20.0, deaf=True))
    daemons = [int((tmp_path / name).read_text()) for name in ("daemon.pid", "program.pid")]
    assert not any(psutil.pid_exists(pid) for pid in daemons)
    assert outcome.timed_out == hang
    if not hang:
        assert outcome.leftover_processes == 2
        assert outcome.result == {}


def test_flood(sandbox, job, tmp_path):
    outcome = sandbox.run(job("flood", megabytes=200))
    assert outcome.result == {}
    assert len(outcome.stderr_tail) <= 64 * 2**10
    assert outcome.stderr_tail.endswith("last words\n")
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 200_000
    sandbox.start()
    assert psutil.Process(sandbox._runner.pid).memory_info().rss < 200 * 2**20


def test_server_killed(sandbox, job, tmp_path):
    sandbox.start()  # whichever test came before
    server = sandbox._runner.pid
    act = AtOnce(tmp_path / "child.pid", lambda: os.kill(server, signal.SIGKILL))
    begun = time.monotonic()
    outcome = sandbox.run(job("daemon", hang=True), poll=act)
    assert time.monotonic() - begun < GONE_SECONDS + 2
    left = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    assert len(left) == 3
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in left)
    status, message = classify(outcome)
    assert status is TrialStatus.CRASHED
    assert "signal 9" in message
    assert sandbox.run(job("echo")).result
    assert sandbox._runner.pid != server


def test_server_killed_between_jobs(sandbox, job):
    sandbox.start()
    os.kill(sandbox._runner.pid, signal.SIGKILL)
    sandbox._runner._process.wait()
    assert sandbox.run(job("echo")).result


def start_controller(tmp_path: Path, entry: str, request: dict, method: str = "fork", **kwargs) -> subprocess.Popen:
    name = f"{entries.__name__}:{entry}"
    return subprocess.Popen(
        [
            sys.executable,
            str(Path(__file__).with_name("controller.py")),
            name,
            json.dumps(request),
            str(tmp_path / "job"),
            method,
        ],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
        text=True,
        **kwargs,
    )


@linux
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("victims", ["controller", "server", "both"])
def test_killed_supervisors_take_everything_along(tmp_path, method, victims):
    request = {"folder": str(tmp_path), "hang": True, "deaf": True}
    with start_controller(tmp_path, "daemon", request, method) as controller:
        server = psutil.Process(int(controller.stdout.readline()))
        family = [pid_in(tmp_path / name) for name in ("child.pid", "daemon.pid", "program.pid")]
        assert not gone(family, 0.2)
        if victims != "controller":
            # First, so that it cannot notice the other's death.
            server.kill()
        if victims != "server":
            controller.kill()
            family.append(server)
        assert gone(family), victims


def test_controller_killed_without_a_server(tmp_path):
    with start_controller(tmp_path, "hang", {"pid_file": str(tmp_path / "child.pid")}, "portable") as controller:
        child = pid_in(tmp_path / "child.pid")
        controller.kill()
        assert gone([child])


@linux
def test_descriptors_closed_by_the_entry_are_no_end(sandbox, job):
    assert sandbox.run(job("close_descriptors")).result == {"lived": True}


def test_interrupt_during_the_imports_ends_at_once(tmp_path, monkeypatch):
    (tmp_path / "imports_for_long.py").write_text("import time; time.sleep(60)")
    monkeypatch.syspath_prepend(str(tmp_path))
    begun = time.monotonic()

    def interrupt():
        raise KeyboardInterrupt

    with Sandbox(preload=("imports_for_long",)) as sandbox, pytest.raises(KeyboardInterrupt):
        sandbox.start(poll=interrupt)
    assert time.monotonic() - begun < 5


@linux
def test_controller_killed_whose_fork_lives_on(tmp_path):
    """A worker forked by the controller holds its pipes open; the server sees by its parent's id all the same."""
    code = (
        "import os, sys, time; sys.argv = ['c', *sys.argv[1:]]\n"
        "from autofit.trial.sandbox import Sandbox\n"
        "s = Sandbox(preload=('json',)); s.start(); print(s._runner.pid, flush=True)\n"
        "worker = os.fork()\n"
        "if worker: print(worker, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as controller:
        server, worker = (psutil.Process(int(controller.stdout.readline())) for _ in range(2))
        controller.kill()
        assert gone([server])
        worker.kill()


def test_ctrl_c_lets_the_child_save(tmp_path):
    """SIGINT to the controller's group does not reach the child; the child gets SIGTERM and its grace."""
    request = {"save_seconds": 0.3, "file": str(tmp_path / "saved")}
    with start_controller(tmp_path, "save_on_sigterm", request, start_new_session=True) as controller:
        server = psutil.Process(int(controller.stdout.readline()))
        phase = tmp_path / "job" / "phase.json"
        while not phase.exists():
            time.sleep(0.02)
        os.killpg(controller.pid, signal.SIGINT)
        assert json.loads(controller.stdout.readline()) == {"interrupted": True}
        assert controller.wait(10) == 130
        assert (tmp_path / "saved").exists()
        assert gone([server])


def test_second_ctrl_c_ends_at_once(tmp_path):
    request = {"deaf": True, "pid_file": str(tmp_path / "child.pid")}
    with start_controller(tmp_path, "hang", request, start_new_session=True) as controller:
        controller.stdout.readline()
        child = pid_in(tmp_path / "child.pid")
        os.killpg(controller.pid, signal.SIGINT)
        time.sleep(0.5)
        assert child.is_running()
        os.killpg(controller.pid, signal.SIGINT)
        assert gone([child], 2.0)
        assert controller.wait(10) == 130


def test_poll_that_raises_ends_the_job(sandbox, job, tmp_path):
    class StopNow(Exception):
        pass

    def stop():
        raise StopNow

    with pytest.raises(StopNow):
        sandbox.run(
            job("save_on_sigterm", save_seconds=0.2, file=str(tmp_path / "saved")),
            poll=lambda: stop() if (tmp_path / "job/phase.json").exists() else None,
        )
    assert sandbox.last_outcome.interrupted
    assert sandbox.last_outcome.result == {"saved": True}
    assert sandbox.run(job("echo")).result


def memory_cgroup(limit_bytes: int) -> Path | None:
    """A cgroup of our own with a memory limit; None where we may not make one."""
    for root, limit in (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")):
        group = Path(root, f"autofit-test-{uuid.uuid4().hex[:8]}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / limit).exists() and (group / "cgroup.procs").exists():
                (group / limit).write_text(str(limit_bytes))
                return group
        except OSError:
            pass
        group.rmdir()
    return None


@linux
def test_kill_by_the_hosts_memory_killer(tmp_path):
    group = memory_cgroup(200 * 2**20)
    if group is None:
        pytest.skip("no cgroup with a memory limit can be made here")
    code = (
        "import os, sys\n"
        "open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "from pathlib import Path\n"
        "from autofit.trial.sandbox import Job, Sandbox\n"
        "from autofit.trial.classify import classify\n"
        "with Sandbox(preload=('json',)) as s:\n"
        "    job = Job(entry=sys.argv[2], request={}, folder=Path(sys.argv[3]), deadline_seconds=30)\n"
        "    o = s.run(job); print(*classify(o), o.signal)\n"
    )
    entry = f"{entries.__name__}:eat_memory"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(group), entry, str(tmp_path / "job")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.startswith("HOST_OOM killed in forward"), done
    finally:
        time.sleep(0.1)
        group.rmdir()
