"""The sandbox beside a real card: the preload leaves CUDA alone, and an end gives the memory back."""

from __future__ import annotations

import pytest

from autofit.trial.classify import classify
from autofit.trial.result import TrialStatus
from autofit.trial.sandbox import Job, Sandbox
from tests.trial import entries

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def sandbox():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def run(sandbox, tmp_path):
    def call(entry, **request):
        job = Job(entry=f"{entries.__name__}:{entry}", request=request, folder=tmp_path, deadline_seconds=120)
        outcome = sandbox.run(job)
        print(entry, request, classify(outcome), f"{outcome.seconds:.2f} s", outcome.result or outcome.error)
        return outcome

    return call


def used_bytes() -> int:
    import pynvml

    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)


def test_stack_is_preloaded_without_cuda(sandbox, run):
    outcome = run("use_bitsandbytes")
    assert outcome.result is not None
    assert outcome.result["finite"]
    assert sandbox.start_method == "fork", sandbox.notes


def test_real_out_of_memory(run):
    outcome = run("allocate", gigabytes=10_000)
    assert classify(outcome)[0] is TrialStatus.OOM
    assert outcome.error["requested_bytes"] == 10_000 * 2**30
    assert outcome.error["device"]["num_ooms"] == 1


def test_no_room_for_a_handle(run):
    assert classify(run("multiply_on_a_full_card"))[0] is TrialStatus.OOM


def test_poisoned_context_is_a_crash(run):
    assert classify(run("device_assert"))[0] is TrialStatus.CRASHED


def test_memory_is_back_when_the_job_is_over(run):
    before = used_bytes()
    assert run("allocate", gigabytes=8, die=True).signal == 9
    assert used_bytes() - before < 64 * 2**20


def test_bitsandbytes_exit(run):
    assert classify(run("bitsandbytes_exit"))[0] is TrialStatus.OOM
