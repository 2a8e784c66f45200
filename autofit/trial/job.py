"""What is asked of a child process, and all that its parent saw of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call of a function in a child process.

    Attributes:
        entry: "package.module:function"; it is called with (request, PhaseReport) and returns a dict of JSON types.
        request: JSON types.
        folder: made if missing. request.json, phase.json, result.json and the ends of stdout and stderr live here.
        deadline_seconds: from the child's start; None: no deadline.
        env: set in the child before the entry is imported and called. What a preloaded library reads when *it* is
            imported (HF_HUB_OFFLINE) must be in this process's environment when the sandbox starts.
        grace_seconds: what the child gets between SIGTERM and SIGKILL when the parent is interrupted. A child
            without a handler for SIGTERM ends at once.
    """

    entry: str
    request: dict[str, Any]
    folder: Path
    deadline_seconds: float | None
    env: Mapping[str, str] = field(default_factory=dict)
    grace_seconds: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything the parent saw; `autofit.trial.classify` says what it means.

    Attributes:
        result: what the entry returned.
        error: where it raised: type, bases (qualified names of the mro), message, traceback, requested_bytes,
            chain (the exceptions it came from), device (the allocator's and the card's state); see `record.py`.
        phase: the last one reported, "start" before any; `phase_record` is all of phase.json.
        exit_code, signal: how the process ended; both None where that is not known.
        host_oom_kill: the kernel's memory killer struck in our cgroup while the job ran.
        seconds: from the child's start until nothing was left of it.
        leftover_processes: descendants that outlived the child and were killed.
        note: what the sandbox itself has to say (its server died, a deadline passed).
    """

    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    phase: str = "start"
    phase_record: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    signal: int | None = None
    timed_out: bool = False
    interrupted: bool = False
    host_oom_kill: bool = False
    stderr_tail: str = ""
    seconds: float = 0.0
    leftover_processes: int = 0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a child process ended, as whoever started it saw it. Fields as in `Outcome`."""

    exit_code: int | None = None
    signal: int | None = None
    timed_out: bool = False
    interrupted: bool = False
    stderr_tail: str = ""
    seconds: float = 0.0
    leftover_processes: int = 0
    note: str = ""
