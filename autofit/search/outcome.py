"""What a search is asked, what it talks to, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from autofit.space.candidate import Candidate
from autofit.space.ladder import DEFAULT_ORDER, Limits
from autofit.trial.result import TrialResult


class Runner(Protocol):
    """Runs one candidate on the real device. FIT means that it was held against the budget."""

    def run(self, candidate: Candidate) -> TrialResult: ...


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """The wish, and how it may be stepped down from: `order` names the rungs of `space.ladder.RUNGS`."""

    wish: Candidate
    limits: Limits
    order: tuple[str, ...] = DEFAULT_ORDER


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One finished trial. `number` counts from 0 in its study.

    `predicted_bytes` is what it was predicted to need on the device before it ran; None where nothing was known.
    """

    number: int
    candidate: Candidate
    result: TrialResult
    predicted_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrialEvent:
    """What a search tells whoever watches.

    Attributes:
        kind: `start` (about to run), `end` (it ran), `stored` (an earlier run of this search had its result).
        number: the trial's, as in the study.
        reason: why this candidate, in a few words.
        predicted_bytes: what it was predicted to need on the device; None where nothing was measured yet.
        result: None at `start`.
    """

    kind: str
    number: int
    candidate: Candidate
    reason: str
    predicted_bytes: int | None = None
    result: TrialResult | None = None


Observer = Callable[[TrialEvent], None]


class TrialStore(Protocol):
    """Where trials are kept while a search runs, so that a killed search goes on (`search.study.TrialStudy`)."""

    def finished(self, candidate: Candidate) -> Trial | None:
        """The stored trial of this candidate, if it has ended."""

    def begin(self, candidate: Candidate) -> int:
        """Puts the intent on disk and returns the trial's number."""

    def end(self, number: int, result: TrialResult) -> None:
        """Stores how the trial ended."""

    def abandon(self, number: int) -> None:
        """The trial was interrupted from outside: its next run counts as the first."""


@dataclass(frozen=True, kw_only=True)
class SearchOutcome:
    """How a search ended.

    Attributes:
        winner: the fastest measured trial that fits with as little as possible given up; None where nothing fits.
        rung: the first trial on the ladder that fits, from which the winner was grown (often the winner itself).
        trials: all of them, in the order they ran.
        nearest_miss: where nothing fits, the tried candidate that ran out of device memory and needs least.
        nearest_miss_bytes: what that one would need on the device (projected or predicted); None if unknown.
    """

    winner: Trial | None
    rung: Trial | None
    trials: tuple[Trial, ...]
    nearest_miss: Trial | None = None
    nearest_miss_bytes: int | None = None
