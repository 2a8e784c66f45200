"""What to do when the training's process has died: whether a new one is worth starting, and with which candidate.

Plain functions of how it ended and of what is known about memory; `training.restarting` acts on them.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from autofit.errors import AutofitError, OutOfBudget
from autofit.search.facts import Facts, Verdict, measured_need, needs_at_least
from autofit.search.forecast import Forecaster, Prediction
from autofit.search.outcome import SearchSpace
from autofit.space.candidate import LOSSLESS, LOSSY, Candidate
from autofit.space.ladder import RUNGS, Limits, knob_values, ladder
from autofit.training.resume import states_of
from autofit.trial.classify import classify, own_error
from autofit.trial.job import Outcome
from autofit.trial.result import TrialStatus

# Of deaths in a row, none of which came further than the one before.
MOST_WITHOUT_PROGRESS = 4
_ASKED_TO_END = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))


class How(StrEnum):
    """How a training's process ended before its time. FINAL: a new process would not help, or nobody wants one."""

    MEMORY = "out of memory"
    HOST_MEMORY = "out of host memory"
    CRASH = "crashed"
    HANG = "hung"
    FINAL = "final"


@dataclass(frozen=True)
class Death:
    """How it ended, and the error that the run ends with unless that is mended."""

    how: How
    error: AutofitError


def judge_death(name: str, outcome: Outcome) -> Death:
    """How the process of the job of that name died; `outcome` has no result."""
    own = own_error(outcome)
    if own is not None:
        return Death(How.MEMORY if isinstance(own, OutOfBudget) else How.FINAL, own)
    if outcome.timed_out:
        return Death(How.HANG, AutofitError(f"{name}: nothing happened for {outcome.seconds:.0f} s in {outcome.phase}"))
    status, message = classify(outcome)
    text = f"{name}: {status.value} in {outcome.phase}: {message}"
    if status is TrialStatus.OOM:
        return Death(How.MEMORY, OutOfBudget(text))
    if status is TrialStatus.HOST_OOM:
        return Death(How.HOST_MEMORY, AutofitError(text))
    crashed = status is TrialStatus.CRASHED and not _asked_to_end(outcome)
    return Death(How.CRASH if crashed else How.FINAL, AutofitError(text))


def _asked_to_end(outcome: Outcome) -> bool:
    asked = "KeyboardInterrupt" in (outcome.error or {}).get("bases", ())
    return asked or outcome.interrupted or outcome.signal in _ASKED_TO_END


class Patience:
    """How often a training is started anew. Steps are the furthest that any process of this run has completed.

    Attributes:
        standstill: deaths in a row that came no further than the one before; 0 after the first.
    """

    def __init__(self) -> None:
        self.standstill = 0
        self._reached = self._crashed_at = -1

    def lasts(self, how: How, step: int) -> bool:
        """Takes in a death after so many steps; whether there is to be another process.

        A crash and a hang have no remedy but another try, so a second one needs to have come further.
        """
        self.standstill = 0 if step > self._reached else self.standstill + 1
        self._reached = max(step, self._reached)
        if how is How.FINAL or self.standstill > MOST_WITHOUT_PROGRESS:
            return False
        if how in (How.CRASH, How.HANG):
            before, self._crashed_at = self._crashed_at, self._reached
            return self._reached > before
        return True


def next_candidate(
    died: Candidate,
    space: SearchSpace,
    how: How,
    *,
    standstill: bool,
    steps_done: bool,
    facts: Facts,
    forecaster: Forecaster,
) -> Candidate | None:
    """What the next process trains with; None where nothing is left that should go better.

    After a crash or a hang the same. After an out-of-memory the next rung of the user's order that needs less, from
    where the candidate is that died; the one that needs least where the last rung down brought no step. What changes
    the result comes last, where the user allows it, and not at all once a step was done: a run has one length, rank
    and bits. Nor does the optimizer change then, where the next kind could not load its states.

    Args:
        standstill: the process got no further than the one before it.
        steps_done: any process of the run has completed a step.
        facts: the search's trials.
    """
    if how in (How.CRASH, How.HANG):
        return died
    movable = [name for name in space.order if _is_movable(RUNGS[name], died, space.limits, how, steps_done)]
    for knobs in (LOSSLESS, LOSSY):
        rungs = ladder(died, space.limits, tuple(name for name in movable if RUNGS[name] in knobs))[1:]
        leaner = _leaner(died, rungs, facts, forecaster)
        if leaner:
            return leaner[-1] if standstill else leaner[0]
    # Host memory is shared: whoever had it may have ended by now.
    return died if how is How.HOST_MEMORY and not standstill else None


def changed_knobs(before: Candidate, after: Candidate) -> dict[str, tuple[int | str, int | str]]:
    """Each knob that differs: its value before and after."""
    values = {knob: (getattr(before, knob), getattr(after, knob)) for knob in (*LOSSLESS, *LOSSY)}
    return {knob: both for knob, both in values.items() if both[0] != both[1]}


def _is_movable(knob: str, died: Candidate, limits: Limits, how: How, steps_done: bool) -> bool:
    if how is How.HOST_MEMORY and knob in ("optimizer", "offload_activations"):
        return False  # both move bytes to the host
    if not steps_done:
        return True
    if knob == "optimizer":
        return len({states_of(str(value)) for value in knob_values(knob, died, limits)}) == 1
    return knob in LOSSLESS


def _leaner(died: Candidate, rungs: Sequence[Candidate], facts: Facts, forecaster: Forecaster) -> list[Candidate]:
    """Those that need less than what died, and were not seen to fail: as they come, but the one of least need last."""
    rungs = [c for c in rungs if facts.verdict(c) in (Verdict.UNKNOWN, Verdict.FITS)]
    if not rungs:
        return []
    asked = [died, *rungs]
    answers = zip(asked, forecaster.predict(asked), strict=True)
    estimated = {c: answer.device_bytes for c, answer in answers if isinstance(answer, Prediction)}
    leaner = [c for c in rungs if _needs_less(c, died, _measured(facts, (c, died)), estimated)]
    if all(c in estimated for c in leaner):
        leanest = min(leaner, key=lambda c: estimated[c], default=None)
        return [*(c for c in leaner if c is not leanest), *(c for c in leaner if c is leanest)]
    return leaner


def _needs_less(
    candidate: Candidate, died: Candidate, measured: dict[Candidate, int], estimated: dict[Candidate, int]
) -> bool:
    # Never one's measurement against the other's estimate: they may differ by a constant.
    for known in (measured, estimated):
        if candidate in known and died in known:
            return known[candidate] < known[died]
    return needs_at_least(died, candidate)


def _measured(facts: Facts, candidates: Sequence[Candidate]) -> dict[Candidate, int]:
    trials = [trial for c in candidates if (trial := facts.tried(c)) and trial.result.status is TrialStatus.FIT]
    needs = {trial.candidate: measured_need(trial.result) for trial in trials}
    return {candidate: need for candidate, need in needs.items() if need is not None}
