"""Every way of running out of memory that was met, and everything that only looks like one."""

from __future__ import annotations

import pytest

from autofit.trial.classify import classify, classify_exception, is_out_of_memory
from autofit.trial.job import Outcome
from autofit.trial.record import describe_exception, requested_bytes
from autofit.trial.result import TrialStatus

torch = pytest.importorskip("torch")

TORCH_OOM = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which 14.75 MiB is "
    "free. Process 1234 has 79.08 GiB memory in use. Of the allocated memory 78.2 GiB is allocated by PyTorch"
)
NCCL_OOM = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, unhandled cuda error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.21.5\nncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\nCuda failure 2 'out of memory'"
)
CPU_OOM = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
BITSANDBYTES_OOM = "Error out of memory at line 380 in file /src/csrc/ops.cu\n"


class MyOutOfMemoryError(Exception):
    """Not torch's."""


class OutOfMemoryError(RuntimeError):
    """Named like torch's, and not it."""


class OutOfResources(Exception):
    """As Triton's, which is about shared memory."""


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def outcome_of(error: BaseException, **kwargs) -> Outcome:
    return Outcome(error=describe_exception(raised(error)), exit_code=1, phase="forward", **kwargs)


COUSINS = [
    torch.OutOfMemoryError(TORCH_OOM),
    torch.cuda.OutOfMemoryError("whatever it says"),
    torch.OutOfMemoryError("autofit: budget of 1000 bytes crossed. Tried to allocate 123 bytes"),
    RuntimeError(TORCH_OOM),
    RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
    ),
    torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the documentation"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("HIP error: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB). Tried to allocate 256 bytes on private pool."),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError(NCCL_OOM),
    RuntimeError("[rank0]: " + NCCL_OOM),
    torch.distributed.DistBackendError(NCCL_OOM),
    torch.distributed.DistBackendError(
        NCCL_OOM.replace("Cuda failure 2 'out of memory'", "Failed to CUDA calloc 608 bytes")
    ),
]

IMPOSTORS = [
    ValueError("row 7: CUDA out of memory is what users report"),
    ValueError(TORCH_OOM),
    RuntimeError("row 3: user text 'out of memory'"),
    RuntimeError("The prompt 'CUDA out of memory. Tried to allocate 20.00 MiB' has no completion"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`; not out of memory"),
    RuntimeError("CUDA error: out of memory-mapped registers"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    RuntimeError("NCCL error in: x.cpp:1, remote process exited or there was a network error, NCCL version 2.21.5"),
    RuntimeError("The NCCL test says: out of memory"),
    KeyError("out of memory"),
    KeyError("CUDA out of memory"),
    AssertionError("CUDA out of memory"),
    SystemExit(1),
    KeyboardInterrupt(),
    MyOutOfMemoryError("CUDA out of memory"),
    OutOfMemoryError("of another library, and no words of CUDA's"),
    OutOfResources("out of resource: shared memory, Required: 147456, Hardware limit: 101376."),
    OSError(28, "No space left on device"),
    FileNotFoundError(2, "out of memory"),
]

HOST = [
    MemoryError(),
    MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data type float64"),
    RuntimeError(CPU_OOM),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 16 bytes."),
    RuntimeError("unable to mmap 4096 bytes from file </m/model.safetensors>: Cannot allocate memory (12)"),
    OSError(12, "Cannot allocate memory"),
]


def label(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:60]


@pytest.mark.parametrize("error", COUSINS, ids=label)
def test_out_of_memory_is_recognised(error):
    assert classify_exception(error) is TrialStatus.OOM
    status, message = classify(outcome_of(error))
    assert status is TrialStatus.OOM
    assert "in forward" in message
    assert "\n" not in message


@pytest.mark.parametrize("error", IMPOSTORS, ids=label)
def test_impostor_is_a_crash(error):
    assert classify_exception(error) is None
    for stderr in ("", "CUDA out of memory\n" + BITSANDBYTES_OOM):
        status, message = classify(outcome_of(error, stderr_tail=stderr))
        assert status is TrialStatus.CRASHED
        assert type(error).__name__ in message


@pytest.mark.parametrize("error", HOST, ids=label)
def test_host_out_of_memory(error):
    assert classify_exception(error) is TrialStatus.HOST_OOM
    assert classify(outcome_of(error))[0] is TrialStatus.HOST_OOM


def test_real_host_allocation():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert classify_exception(caught.value) is TrialStatus.HOST_OOM


class TestNoHandle:
    """CUBLAS_STATUS_NOT_INITIALIZED: an out-of-memory only where one is in evidence."""

    error = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")

    def described(self, **device):
        return Outcome(error={**describe_exception(self.error), "device": device})

    def test_alone(self):
        assert classify(self.described())[0] is TrialStatus.CRASHED
        assert classify(self.described(num_ooms=0, free_bytes=2**34))[0] is TrialStatus.CRASHED

    def test_card_without_room(self):
        assert classify(self.described(num_ooms=0, free_bytes=2**24))[0] is TrialStatus.OOM

    def test_after_the_allocator_met_one(self):
        assert classify(self.described(num_ooms=2, free_bytes=2**34))[0] is TrialStatus.OOM

    def test_while_one_was_handled(self):
        error = raised_while_handling(RuntimeError(str(self.error)), explicit=False)
        assert classify_exception(error) is TrialStatus.OOM


def raised_while_handling(error: BaseException, *, explicit: bool) -> BaseException:
    """`error`, raised in the handler of an out-of-memory; explicitly from it or not."""
    try:
        try:
            raise torch.OutOfMemoryError(TORCH_OOM)
        except torch.OutOfMemoryError as inner:
            if explicit:
                raise error from inner
            raise error  # noqa: B904
    except BaseException as caught:
        return caught


def test_raised_from_an_out_of_memory_is_one():
    error = raised_while_handling(ValueError("the step failed"), explicit=True)
    assert classify_exception(error) is TrialStatus.OOM


def test_failure_of_the_handler_is_a_crash():
    assert classify_exception(raised_while_handling(KeyError("a bug"), explicit=False)) is None


def test_circular_chain():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert classify_exception(first) is None


def test_exception_whose_text_raises():
    class Broken(Exception):
        def __str__(self):
            raise RuntimeError("no")

    assert "could not be had" in describe_exception(Broken())["message"]


def test_type_names_need_no_torch():
    assert is_out_of_memory(["torch.OutOfMemoryError", "RuntimeError"], "")
    assert not is_out_of_memory(["mine.OutOfMemoryError", "RuntimeError"], "")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (TORCH_OOM, 20 * 2**20),
        ("Tried to allocate 123 bytes", 123),
        ("Tried to allocate 1.50 GiB.", 3 * 2**29),
        ("you tried to allocate 4000000000000 bytes.", 4 * 10**12),
        ("MPS backend out of memory (MPS allocated: 9.05 GB). Tried to allocate 256 bytes on private pool", 256),
        ("CUDA error: out of memory", None),
    ],
)
def test_requested_bytes(message, expected):
    assert requested_bytes(message) == expected
    assert describe_exception(RuntimeError(message))["requested_bytes"] == expected


DEATHS = [
    ({"exit_code": 1, "stderr_tail": "loading\n" + BITSANDBYTES_OOM}, "OOM"),
    ({"exit_code": 1, "stderr_tail": BITSANDBYTES_OOM + "leaked semaphore objects\n"}, "OOM"),
    ({"exit_code": 1, "stderr_tail": "Error invalid argument at line 380 in file /src/csrc/ops.cu\n"}, "CRASHED"),
    ({"exit_code": 1, "stderr_tail": "row 3: Error out of memory at line 380 in file /src/csrc/ops.cu\n"}, "CRASHED"),
    ({"exit_code": 1, "stderr_tail": "we ran out of memory\nCUDA out of memory\n"}, "CRASHED"),
    ({"exit_code": 0, "stderr_tail": BITSANDBYTES_OOM}, "CRASHED"),
    ({"exit_code": 2, "stderr_tail": BITSANDBYTES_OOM}, "CRASHED"),
    ({"signal": 11, "stderr_tail": BITSANDBYTES_OOM}, "CRASHED"),
    ({"signal": 9}, "CRASHED"),
    ({"signal": 9, "host_oom_kill": True}, "HOST_OOM"),
    ({"signal": 11, "host_oom_kill": True}, "CRASHED"),
    ({"signal": 9, "timed_out": True}, "TIMEOUT"),
    ({"signal": 9, "timed_out": True, "host_oom_kill": True}, "TIMEOUT"),
    ({"note": "the trial server ended (signal 9)"}, "CRASHED"),
    ({"note": "the trial server ended (signal 9)", "host_oom_kill": True}, "HOST_OOM"),
    ({"exit_code": 0}, "CRASHED"),
    ({"result": {}, "exit_code": 0}, "FIT"),
    ({"result": {}, "signal": 9}, "FIT"),
]


@pytest.mark.parametrize(("seen", "status"), DEATHS)
def test_deaths(seen, status):
    got, message = classify(Outcome(phase="optimizer", **seen))
    assert got == status
    assert "\n" not in message
    assert (message == "") == (status == "FIT")


def test_crash_says_what_was_last_on_stderr():
    assert "boom" in classify(Outcome(exit_code=3, stderr_tail="first\nboom\n\n"))[1]
    dump = "Fatal Python error: Segmentation fault\n\nThread 0x1:\n  File x\n"
    assert "Segmentation fault" in classify(Outcome(signal=11, stderr_tail=dump))[1]
    assert "from outside" in classify(Outcome(signal=9))[1]


def test_killed_dataloader_worker_is_a_host_out_of_memory():
    error = RuntimeError("DataLoader worker (pid 123) is killed by signal: Killed. ")
    assert classify(outcome_of(error, host_oom_kill=True))[0] is TrialStatus.HOST_OOM
    assert classify(outcome_of(error))[0] is TrialStatus.CRASHED
