"""Jobs that behave, jobs that raise, and what they cost. Each in a real child process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest

from autofit.trial import supervise
from autofit.trial.classify import classify
from autofit.trial.portable import PortableRunner
from autofit.trial.result import TrialStatus
from autofit.trial.sandbox import Job, Sandbox

from . import entries


@pytest.fixture(scope="module", params=["fork", "spawn", "portable"])
def sandbox(request):
    with Sandbox(preload=("json",), start_method="fork" if request.param == "fork" else "spawn") as sandbox:
        if request.param == "portable":
            sandbox._runner = PortableRunner()
        yield sandbox


@pytest.fixture(scope="module")
def forking():
    with Sandbox(preload=("json",)) as sandbox:
        yield sandbox


@pytest.fixture
def job(tmp_path):
    def make(entry, deadline_seconds=20.0, env=None, **request):
        return Job(
            entry=f"{entries.__name__}:{entry}",
            request={"folder": str(tmp_path / "job"), **request},
            folder=tmp_path / "job",
            deadline_seconds=deadline_seconds,
            env=env or {},
        )

    return make


def test_result_and_phase(sandbox, job):
    outcome = sandbox.run(job("echo", a=[1, "é"]))
    assert outcome.result is not None
    assert outcome.result["echo"]["a"] == [1, "é"]
    assert (outcome.phase, outcome.phase_record["live_bytes"]) == ("forward", 7)
    assert (outcome.exit_code, outcome.signal, outcome.error) == (0, None, None)
    assert not outcome.timed_out
    assert classify(outcome) == (TrialStatus.FIT, "")


def test_child_is_apart(sandbox, job):
    seen = sandbox.run(job("show_process", env={"TRIAL_TEST": "yes"})).result
    assert seen["session"]
    assert seen["stdin"] == ""
    assert seen["environment"] == "yes"
    assert "TRIAL_TEST" not in os.environ


def test_environment_of_one_job_does_not_reach_the_next(sandbox, job):
    sandbox.run(job("show_process", env={"TRIAL_TEST": "yes"}))
    assert sandbox.run(job("show_process")).result["environment"] is None


def test_exception(sandbox, job):
    outcome = sandbox.run(job("raise_error", code="raise ValueError('row 3: out of memory\\nmore')"))
    assert outcome.result is None
    assert outcome.error["type"] == "ValueError"
    assert outcome.error["bases"][:2] == ["ValueError", "Exception"]
    assert "raise_error" in outcome.error["traceback"]
    assert "row 3" in outcome.stderr_tail
    assert outcome.exit_code == 1
    assert classify(outcome) == (TrialStatus.CRASHED, "ValueError in backward: row 3: out of memory")


def test_memory_error(sandbox, job):
    assert classify(sandbox.run(job("raise_error", code="raise MemoryError")))[0] is TrialStatus.HOST_OOM


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"code": 0}, "CRASHED"),
        ({"code": 7}, "CRASHED"),
        ({"code": 1, "stderr": "Error out of memory at line 9 in file /src/csrc/ops.cu\n"}, "OOM"),
        ({"code": 1, "stderr": "Error out of memory at line 9 in file /src/csrc/ops.cu\n", "python": 1}, "CRASHED"),
    ],
)
def test_exit_codes(sandbox, job, request_, status):
    outcome = sandbox.run(job("exit_now", **request_))
    assert outcome.exit_code == request_["code"]
    assert outcome.stderr_tail.startswith(request_.get("stderr", ""))
    assert classify(outcome)[0] == status


@pytest.mark.parametrize(("what", "says"), [("huge", "limit"), ("bytes", "not JSON"), ("list", "not a dict")])
def test_result_that_cannot_be_handed_back(forking, job, what, says):
    outcome = forking.run(job("return_it", what=what))
    status, message = classify(outcome)
    assert status is TrialStatus.CRASHED
    assert says in message
    assert outcome.result is None


def test_half_written_result_is_none(sandbox, job):
    outcome = sandbox.run(job("leave_torn_result"))
    assert (outcome.result, outcome.error) == (None, None)
    assert classify(outcome)[0] is TrialStatus.CRASHED


def test_earlier_result_is_not_this_one(forking, job):
    assert forking.run(job("echo")).result
    outcome = forking.run(job("exit_now", code=5))
    assert (outcome.result, outcome.phase) == (None, "start")


@pytest.mark.parametrize("entry", ["no.such.module:f", f"{entries.__name__}:nothing", "nonsense"])
def test_wrong_entry(forking, tmp_path, entry):
    outcome = forking.run(Job(entry=entry, request={}, folder=tmp_path, deadline_seconds=20))
    status, message = classify(outcome)
    assert status is TrialStatus.CRASHED
    assert re.split("[.:]", entry)[0] in message


def test_request_that_is_not_json(forking, job):
    with pytest.raises(TypeError):
        forking.run(job("echo", what=object()))
    assert forking.run(job("echo")).result


def test_poll_is_called(forking, job):
    calls: list[float] = []
    forking.run(job("raise_error", code="import time; time.sleep(1.1)"), poll=lambda: calls.append(1))
    assert len(calls) >= 3


def test_sandbox_within_a_child(forking, job):
    assert forking.run(job("run_inner_sandbox")).result["inner"]


def test_no_descriptor_piles_up(forking, job):
    def count():
        return len(os.listdir("/proc/self/fd")), forking.run(job("show_process")).result["descriptors"]

    forking.start()
    first = count()
    for _ in range(5):
        forking.run(job("echo"))
    assert count() == first


def test_closed_sandbox_starts_again(job):
    sandbox = Sandbox(preload=("json",))
    assert sandbox.run(job("echo")).result
    sandbox.close()
    sandbox.close()
    assert sandbox.run(job("echo")).result
    sandbox.close()


def test_import_that_fails_is_noted(job):
    with Sandbox(preload=("no_such_module_here", "json")) as sandbox:
        assert sandbox.run(job("echo")).result
        assert any("no_such_module_here" in note for note in sandbox.notes)


def test_server_that_dies_while_importing_gives_way_to_spawn(job, tmp_path, monkeypatch):
    (tmp_path / "kills_its_importer.py").write_text("import os; os._exit(9)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with Sandbox(preload=("kills_its_importer",)) as sandbox:
        assert sandbox.run(job("echo")).result
        assert sandbox.start_method == "spawn"
        assert "exit code 9" in sandbox.notes[0]


def test_controller_imports_no_torch():
    code = "import sys, autofit.trial.sandbox, autofit.trial.classify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_preloaded_torch(job):
    """Parallel operations do not hang in a fork, nothing is imported twice, and a job costs little."""
    with Sandbox(preload=("torch",)) as sandbox:
        first = sandbox.run(job("multiply"))
        assert first.result is not None, first
        assert first.result["finite"]
        assert sandbox.start_method == "fork"
        overhead = []
        for _ in range(3):
            begun = time.monotonic()
            assert sandbox.run(job("echo")).result
            overhead.append(time.monotonic() - begun)
        print(f"overhead of a job: {min(overhead):.3f} s")
        assert min(overhead) < 2.0
        oom = "import torch\nraise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB.')"
        outcome = sandbox.run(job("raise_error", code=oom))
        assert classify(outcome)[0] is TrialStatus.OOM
        assert outcome.error["requested_bytes"] == 20 * 2**20


def test_tail_keeps_only_the_end():
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    tail = supervise.Tail(reader)
    for number in range(100):
        os.write(writer, b"%04d" % number * 1000)
        tail.drain()
    os.close(writer)
    tail.drain()
    os.close(reader)
    assert not tail.open
    assert len(tail.kept) == supervise.TAIL_BYTES
    assert tail.text().endswith("0099")
