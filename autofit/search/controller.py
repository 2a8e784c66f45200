"""The measured search: try the wish, jump down the ladder to the first candidate that fits, grow back, choose.

At most `MAX_TRIALS` trials, each in a child process behind a `Runner`. No candidate is tried twice, none that cannot
fit is tried at all, and the winner was measured.
"""

from __future__ import annotations

from autofit.search.attempts import MAX_TRIALS, Attempts, Choice
from autofit.search.descend import choose, first_fit
from autofit.search.facts import Facts
from autofit.search.grow import Growth, fastest
from autofit.search.outcome import Observer, Runner, SearchOutcome, SearchSpace, Trial, TrialEvent, TrialStore
from autofit.search.predict import Predictor
from autofit.space.budget import MemoryBudget
from autofit.space.ladder import ladder
from autofit.trial.result import TrialStatus

__all__ = ["MAX_TRIALS", "Runner", "SearchOutcome", "SearchSpace", "Trial", "TrialEvent", "TrialStore", "measure"]


def measure(
    space: SearchSpace, budget: MemoryBudget, runner: Runner, store: TrialStore, on_trial: Observer
) -> SearchOutcome:
    """Searches the space for the fastest candidate that fits with as little given up as possible.

    A trial that `store` has is not run again. Whatever the runner raises ends the search and leaves the trial as if
    it had not begun.

    Args:
        budget: a trial's need is compared with its `usable_bytes`.
        on_trial: called before and after each trial.
    """
    return _Search(space, budget, runner, store, on_trial).run()


class _Search:
    def __init__(
        self, space: SearchSpace, budget: MemoryBudget, runner: Runner, store: TrialStore, on_trial: Observer
    ) -> None:
        self._space = space
        self._chain = ladder(space.wish, space.limits, space.order)
        self._facts = Facts(budget.usable_bytes)
        self._attempts = Attempts(self._facts, runner, store, on_trial)
        self._predictor = Predictor(self._facts, space.wish, space.limits.checkpointable_layers)

    def run(self) -> SearchOutcome:
        rung = self._descend()
        if rung is None:
            return self._nothing_fits()
        growth = Growth(self._space, self._facts, self._predictor, rung)
        while self._attempts.left and (choice := growth.choose()):
            self._attempts.run(choice)
        winner = fastest(self._facts, rung, self._space.wish)
        return SearchOutcome(winner=winner, rung=rung, trials=tuple(self._facts.trials))

    def _descend(self) -> Trial | None:
        """The first trial of the chain that fits; None where there is none, or every trial crashes alike."""
        self._attempts.run(Choice(self._space.wish, "the wish"))
        while self._attempts.left and not self._attempts.crash_alike():
            choice = choose(self._chain, self._facts, self._predictor, self._attempts.left)
            if choice is None:
                break
            self._attempts.run(choice)
        fit = first_fit(self._chain, self._facts)
        return None if fit is None else self._facts.tried(fit)

    def _nothing_fits(self) -> SearchOutcome:
        trials = tuple(self._facts.trials)
        misses = [t for t in trials if t.result.status is TrialStatus.OOM]
        if not misses:
            return SearchOutcome(winner=None, rung=None, trials=trials)
        needs = {t.number: self._missed_need(t) for t in misses}
        # Of equals, and where nothing is known, the one further down the ladder.
        nearest = min(misses, key=lambda t: (needs[t.number] or float("inf"), -self._chain.index(t.candidate)))
        return SearchOutcome(
            winner=None, rung=None, trials=trials, nearest_miss=nearest, nearest_miss_bytes=needs[nearest.number]
        )

    def _missed_need(self, trial: Trial) -> int | None:
        projected = trial.result.projected_bytes
        if projected is not None:
            return max(projected, self._facts.usable_bytes + 1)
        return self._predictor.need(trial.candidate)
