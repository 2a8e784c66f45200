"""Running out of memory as something that is met and not raised."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from autofit.errors import OutOfBudget
from autofit.trial.classify import classify_exception
from autofit.trial.record import requested_bytes

# After so many steps without a fault what was cut grows back.
QUIET_STEPS = 100
# How often what should need no more memory the second time is tried again.
TIMES = 3
# What is done about a first out-of-memory, which may have been another process's.
AGAIN = "freed memory and tried the same again"
# What an estimate of a step is about.
_OF_STEP = ("step", "forward", "backward", "loss", "optimizer", "clipping")


class Watch:
    """`with Watch() as watch: work()`: swallows an out-of-memory, and nothing else.

    Afterwards, outside any `except`, nothing holds the failed frames and their tensors any more.

    Args:
        held: says what held the memory; asked while the failed work still does.

    Attributes:
        fault: the out-of-memory's message; None where there was none.
        within: "forward", "backward" or "loss"; None where it was in none of them.
        about: of a fault: the bytes it asked for, what held the memory, and the seconds that were lost.
    """

    def __init__(self, held: Callable[[], dict[str, int]] | None = None) -> None:
        self.fault: str | None = None
        self.within: str | None = None
        self.about: dict[str, Any] = {}
        self._held = held
        self._begun = 0.0

    def __enter__(self) -> Watch:
        self._begun = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or isinstance(error, OutOfBudget) or classify_exception(error) is None:
            return False
        self.fault = " ".join(str(error).split())[:200] or type(error).__name__
        self.within = _pass_of(trace)
        self.about = {
            "requested_bytes": requested_bytes(str(error)),
            "seconds": round(time.monotonic() - self._begun, 3),
        }
        if self._held is not None:
            self.about["held_bytes"] = self._held()
        return True


def _pass_of(trace: TracebackType | None) -> str | None:
    """Which pass of a step failed; what a backward pass recomputes is its own."""
    names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(trace)]
    for name in names:
        if name == "backward":
            return "backward"
        if name == "_call_impl":  # of a module
            return "forward"
    return "loss" if "compute_loss" in names else None


def allocator_retries() -> int:
    """How often the allocator had to give its cache back to find room, in this process; 0 without a GPU."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return 0
    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))


class Strain:
    """Notices that the allocator finds room, step after step, only by giving its cache back: slow, and soon too little.

    Once is how a cache makes room for other sizes.
    """

    def __init__(self) -> None:
        self._retries = 0
        self._steps = 0

    def after_step(self) -> bool:
        """Whether this step and the one before were such."""
        retries = allocator_retries()
        self._steps = self._steps + 1 if retries > self._retries else 0
        self._retries = retries
        if self._steps < 2:
            return False
        self._steps = 0
        return True


def held_bytes(model: nn.Module, optimizer: Any) -> dict[str, int]:
    """What of the device's memory weights, gradients and optimizer states hold; on a GPU also what all else does.

    States that bitsandbytes pages are in managed memory, which is not the allocator's.

    Args:
        optimizer: None where there is none yet.
    """
    tensors = [*model.parameters(), *model.buffers()]
    states = (
        value for state in (optimizer.state.values() if optimizer is not None else ()) for value in state.values()
    )
    found = {
        "weights": sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values()),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(value.nbytes for value in states if torch.is_tensor(value) and not hasattr(value, "is_paged")),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["activations and all else"] = torch.cuda.memory_allocated() - sum(found.values())
    return found


def free_memory() -> None:
    """Gives back what nobody holds any more, to the allocator and by it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Record:
    """What happened, in memory and in `events.jsonl` of a folder.

    Args:
        always: is in every line.

    Attributes:
        estimated_bytes: the breakdown of what a step was estimated to need; None where it was not estimated.
        holder: measures what holds the device's memory, see `held_bytes`.
    """

    estimated_bytes: Mapping[str, int] | None = None
    holder: Callable[[], dict[str, int]] | None = None

    def __init__(self, folder: str | None, **always: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self._always = always
        self._file = None if folder is None else Path(folder) / "events.jsonl"

    def watch(self) -> Watch:
        """A watch that also measures what held the memory."""
        return Watch(self.holder)

    def oom(self, watch: Watch, phase: str, did: str, **about: Any) -> None:
        """An out-of-memory, and what was done about it; one of a step beside what that was estimated to need."""
        if self.estimated_bytes is not None and phase in _OF_STEP:
            about["estimated_bytes"] = {part: size for part, size in self.estimated_bytes.items() if size}
        self.add("oom", phase=phase, message=watch.fault, did=did, **watch.about, **about)

    def summary(self) -> list[str]:
        """What happened, in at most three lines; none where nothing ran out of memory."""
        ooms = [event for event in self.events if event["event"] == "oom"]
        if not ooms:
            return []
        phases = Counter(event["phase"] for event in ooms)
        counted = ", ".join(f"{count} in {phase}" for phase, count in phases.items())
        lost = sum(event.get("seconds") or 0 for event in ooms)
        lines = [
            f"out of memory {len(ooms)} times: {counted}",
            f"the last time: {ooms[-1]['did']}; {lost:.1f} seconds were done again; every sequence counted once",
        ]
        return lines if self._file is None else [*lines, f"all of it: {self._file}"]

    def add(self, event: str, **about: Any) -> None:
        """One more event; a file that cannot be written loses no training."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **self._always, **about}
        self.events.append(line)
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError:
            self._file = None


def retried(record: Record, phase: str, work: Callable[[], Any], times: int = TIMES) -> Any:
    """The result of work that may be done again from its start; memory is freed between the attempts.

    Raises:
        OutOfBudget: it ran out of memory each time.
    """
    for _ in range(times):
        with record.watch() as watch:
            return work()
        free_memory()
        record.oom(watch, phase, "freed memory and tried again")
    raise OutOfBudget(f"{phase} does not fit, tried {times} times: {watch.fault}")
