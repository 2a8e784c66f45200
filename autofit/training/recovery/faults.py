"""Running out of memory as something that is met and not raised."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from autofit.errors import OutOfBudget
from autofit.trial.classify import classify_exception

# After so many steps without a fault what was cut grows back.
QUIET_STEPS = 100
# How often what should need no more memory the second time is tried again.
_TIMES = 3


class Watch:
    """`with Watch() as watch: work()`: swallows an out-of-memory, and nothing else.

    Afterwards, outside any `except`, nothing holds the failed frames and their tensors any more.

    Attributes:
        fault: the out-of-memory's message; None where there was none.
    """

    def __init__(self) -> None:
        self.fault: str | None = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or isinstance(error, OutOfBudget) or classify_exception(error) is None:
            return False
        self.fault = " ".join(str(error).split())[:200] or type(error).__name__
        return True


def free_memory() -> None:
    """Gives back what nobody holds any more, to the allocator and by it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Record:
    """What happened, in memory and in `events.jsonl` of a folder."""

    def __init__(self, folder: str | None) -> None:
        self.events: list[dict[str, Any]] = []
        self._file = None if folder is None else Path(folder) / "events.jsonl"

    def add(self, event: str, **about: Any) -> None:
        """One more event; a file that cannot be written loses no training."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **about}
        self.events.append(line)
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError:
            self._file = None


def retried(record: Record, phase: str, work: Callable[[], Any]) -> Any:
    """The result of work that may be done again from its start; memory is freed between the attempts.

    Raises:
        OutOfBudget: it ran out of memory each time.
    """
    for _ in range(_TIMES):
        with Watch() as watch:
            return work()
        free_memory()
        record.add("oom", phase=phase, message=watch.fault, did="freed memory and tried again")
    raise OutOfBudget(f"{phase} does not fit, tried {_TIMES} times: {watch.fault}")
