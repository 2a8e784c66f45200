"""What an outcome means. Judged by an exception's type, or by how its message begins, or by how the process died;
never by words found somewhere: user data may say "out of memory" too. No torch: names of types are enough.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from typing import Any

from autofit.errors import BY_NAME, AutofitError
from autofit.trial.job import Outcome
from autofit.trial.record import describe_exception
from autofit.trial.result import TrialStatus

MAX_MESSAGE = 300

# What cuBLAS or cuDNN need for a handle; with less than this free, their "not initialized" means "no memory".
HANDLE_BYTES = 256 * 2**20

_DEVICE_TYPES = {"torch.OutOfMemoryError", "torch.cuda.OutOfMemoryError"}

# The beginning of a RuntimeError's message.
_DEVICE_MESSAGE = re.compile(
    r"""
      (CUDA|HIP|XPU|MPS[ ]backend)[ ]out[ ]of[ ]memory(?![-\w])
    | (CUDA|HIP)[ ](driver[ ])?error:[ ]out[ ]of[ ]memory(?![-\w])
    | Triton[ ]Error[ ]\[(CUDA|HIP)\]:[ ]out[ ]of[ ]memory(?![-\w])
    | (\w+[ ]error:[ ])?(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS)_STATUS_ALLOC_FAILED\b
    | (\w+[ ]error:[ ])?CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED\b
    """,
    re.VERBOSE,
)
_NCCL_MESSAGE = re.compile(r"(\[[^\]]*\]:?\s*)*NCCL\b.*?(\bout of memory\b|Failed to CUDA (m|c)alloc\b)", re.DOTALL)
_NO_HANDLE_MESSAGE = re.compile(r"(\w+ error: )?(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_NOT_INITIALIZED\b")
_HOST_MESSAGE = re.compile(
    r"""
      (\[enforce[ ]fail[ ]at[ ][^\]]*\][^D]{0,40})?DefaultCPUAllocator:[ ](can't[ ]allocate|not[ ]enough)[ ]memory\b
    | (\w+[ ]error:[ ])?CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED\b
    | unable[ ]to[ ]mmap[ ]\d+[ ]bytes[ ]from[ ]file[ ]<[^>]*>:[ ]Cannot[ ]allocate[ ]memory\b
    | \[Errno[ ]12\]
    """,
    re.VERBOSE,
)
_WORKER_KILLED_MESSAGE = re.compile(r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (is killed by signal: Killed|exited)")

# bitsandbytes' CUDA_CHECK_RETURN prints this, one line, and calls exit(1).
_BITSANDBYTES_LINE = re.compile(
    r"^(Error out of memory at line \d+ in file \S+|CUDA error: out of memory)\s*$", re.MULTILINE
)


def own_error(outcome: Outcome) -> AutofitError | None:
    """The child's error, where it is one that the user can act on: a wrong request, not a failed trial."""
    error = outcome.error or {}
    for base in error.get("bases", ()):
        module, _, name = base.rpartition(".")
        if module == "autofit.errors":
            return BY_NAME[name](error["message"])
    return None


def classify(outcome: Outcome) -> tuple[TrialStatus, str]:
    """Status and a message of one line. FIT says that the entry returned; whether what it measured fits is for the
    caller to decide."""
    if outcome.result is not None:
        return TrialStatus.FIT, ""
    if outcome.timed_out:
        return TrialStatus.TIMEOUT, f"no end after {outcome.seconds:.0f} s, in {outcome.phase}"
    if outcome.error is not None:
        return _judge_error(outcome, outcome.error)
    return _judge_death(outcome)


def is_out_of_memory(bases: Iterable[str], message: str) -> bool:
    """Whether an exception means that the device's memory ran out.

    Args:
        bases: qualified names of its type and the type's bases.
        message: its text.
    """
    names = set(bases)
    if names & _DEVICE_TYPES:
        return True
    if "RuntimeError" not in names:
        return False
    return bool(_DEVICE_MESSAGE.match(message) or _NCCL_MESSAGE.match(message))


def is_host_out_of_memory(bases: Iterable[str], message: str) -> bool:
    """As `is_out_of_memory`, of the host's memory."""
    names = set(bases)
    return "MemoryError" in names or bool(names & {"RuntimeError", "OSError"} and _HOST_MESSAGE.match(message))


def classify_exception(error: BaseException) -> TrialStatus | None:
    """OOM or HOST_OOM; None for what has nothing to do with memory."""
    return judge(describe_exception(error))


def judge(described: dict[str, Any]) -> TrialStatus | None:
    """As `classify_exception`, for the record that `describe_exception` makes.

    An exception raised from an out-of-memory (`raise … from`) is one. One that merely came up while an
    out-of-memory was handled is not, unless it is a library that got no handle.
    """
    causes = [described, *(link for link in described.get("chain", ()) if link["link"] == "cause")]
    for one in causes:
        if is_out_of_memory(one["bases"], one["message"]) or _no_handle(one, described):
            return TrialStatus.OOM
        if is_host_out_of_memory(one["bases"], one["message"]):
            return TrialStatus.HOST_OOM
    return None


def _no_handle(one: dict[str, Any], described: dict[str, Any]) -> bool:
    """`CUBLAS_STATUS_NOT_INITIALIZED` has other causes (a driver too old, a poisoned context). It counts where the
    allocator has met an out-of-memory in this process, or the card has no room for a handle."""
    if "RuntimeError" not in one["bases"] or not _NO_HANDLE_MESSAGE.match(one["message"]):
        return False
    device = described.get("device", {})
    if device.get("num_ooms", 0) > 0 or device.get("free_bytes", HANDLE_BYTES) < HANDLE_BYTES:
        return True
    return any(is_out_of_memory(link["bases"], link["message"]) for link in described.get("chain", ()))


def _judge_error(outcome: Outcome, error: dict[str, Any]) -> tuple[TrialStatus, str]:
    message = f"{error['type']} in {outcome.phase}: {_first_line(error['message'])}"
    status = judge(error)
    if status is None and outcome.host_oom_kill and _WORKER_KILLED_MESSAGE.match(error["message"]):
        status = TrialStatus.HOST_OOM
    return status or TrialStatus.CRASHED, _cut(message)


def _judge_death(outcome: Outcome) -> tuple[TrialStatus, str]:
    where = f"in {outcome.phase}"
    if outcome.interrupted:
        return TrialStatus.CRASHED, f"interrupted {where}"
    unexplained = outcome.exit_code is None and outcome.signal is None
    if outcome.host_oom_kill and (outcome.signal == 9 or unexplained):
        return TrialStatus.HOST_OOM, f"killed {where}: the host's memory ran out"
    if outcome.exit_code == 1 and (found := _BITSANDBYTES_LINE.search(outcome.stderr_tail)):
        return TrialStatus.OOM, _cut(f"exit(1) {where}: {found[0].strip()}")
    if outcome.signal == 9:
        how = "killed by signal 9 from outside"
    elif outcome.signal is not None:
        how = f"killed by {_signal_name(outcome.signal)}"
    elif outcome.exit_code is not None:
        how = f"ended with exit code {outcome.exit_code} and left no result"
    else:
        how = outcome.note or "lost"
    return TrialStatus.CRASHED, _cut(f"{how}, {where}{_last_words(outcome.stderr_tail)}")


def _signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def _last_words(stderr: str) -> str:
    """The line of a fatal error, or else the last one; "" of nothing."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    fatal = [line for line in lines if line.startswith("Fatal Python error")]
    return f": {[*lines[-1:], *fatal[-1:]][-1]}" if lines else ""


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else ""


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"
