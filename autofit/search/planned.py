"""The planned search: the estimates choose, a trial confirms, and what it measured corrects the other estimates.

As in `search.controller`: at most `MAX_TRIALS` trials, no candidate twice, and the winner was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autofit.search.attempts import Attempts, Choice
from autofit.search.correction import Correction
from autofit.search.facts import Facts, Verdict
from autofit.search.forecast import Forecaster, Prediction
from autofit.search.grow import fastest, given_up
from autofit.search.outcome import Observer, Runner, SearchOutcome, SearchSpace, Trial, TrialStore
from autofit.space.budget import MemoryBudget
from autofit.space.candidate import Candidate
from autofit.space.stages import Stage, stages
from autofit.trial.result import TrialStatus

# Another candidate must promise to be so much faster than what was measured to be worth a trial.
WORTH = 1.05
# Estimated speeds that are no further apart count as equal; what gives up less is taken.
_AS_FAST = 0.98
# Once something was tried, what is estimated to need more than this share of the usable bytes is not hoped for.
_HOPE = 1.25
# So many estimates are asked for at once where the first that fits is wanted, not the fastest.
_AT_ONCE = 8


class NoForecast(Exception):
    """Not one candidate could be estimated; says why."""


def plan_and_probe(
    space: SearchSpace,
    budget: MemoryBudget,
    forecaster: Forecaster,
    runner: Runner,
    store: TrialStore,
    on_trial: Observer,
) -> SearchOutcome:
    """Searches the space for the fastest candidate that fits with nothing given up that changes the result, or as
    little of it as possible. Where no speeds are known, what gives up least by the ladder's order counts as fastest.

    Raises:
        NoForecast: the model cannot be estimated at all; nothing was tried.
    """
    return _PlannedSearch(
        space, budget, forecaster, Attempts(Facts(budget.usable_bytes), runner, store, on_trial)
    ).run()


class _PlannedSearch:
    def __init__(self, space: SearchSpace, budget: MemoryBudget, forecaster: Forecaster, attempts: Attempts) -> None:
        self._space, self._usable_bytes = space, budget.usable_bytes
        self._stages = stages(space.wish, space.limits, space.order)
        self._attempts, self._facts = attempts, attempts.facts
        self._outlook = _Outlook(forecaster)
        self._correction = Correction(self._usable_bytes)

    def run(self) -> SearchOutcome:
        self._outlook.look([self._space.wish])
        while self._attempts.left and not self._attempts.crash_alike():
            choice = self._next()
            if choice is None:
                break
            trial = self._attempts.run(choice)
            self._correction.add(trial, self._outlook.of(choice.candidate))
        fits = self._first_fit()
        if fits is None:
            return self._nothing_fits()
        _, rung = fits
        winner = fastest(self._facts, rung, self._space.wish)
        return SearchOutcome(winner=winner, rung=rung, trials=tuple(self._facts.trials))

    def _next(self) -> Choice | None:
        """What to try next; None where nothing better is predicted to fit than what was measured."""
        fits = self._first_fit()
        if fits is None:
            if self._attempts.left == 1:
                return self._last_resort()
            candidate = self._best_of(self._stages)
            if candidate is None:
                return self._last_resort()
            first = not self._facts.trials
            return self._choice(candidate, "the estimates' choice" if first else "the corrected estimates' choice")
        number, trial = fits
        if trial.candidate == self._space.wish:
            return None
        earlier = self._best_of(self._stages[:number])
        if earlier is not None:
            return self._choice(earlier, "gives up less, by the corrected estimates")
        faster = self._best_in(self._stages[number])
        if faster is None or self._facts.tried(faster) or not self._pays(faster):
            return None
        return self._choice(faster, "faster, by the corrected estimates")

    def _choice(self, candidate: Candidate, reason: str) -> Choice:
        return Choice(candidate, reason, self._need(candidate))

    def _first_fit(self) -> tuple[int, Trial] | None:
        """The earliest stage with a trial that fits, and the first such trial."""
        for number, stage in enumerate(self._stages):
            members = set(stage.candidates)
            for trial in self._facts.trials:
                if trial.result.status is TrialStatus.FIT and trial.candidate in members:
                    return number, trial
        return None

    def _best_of(self, among: Sequence[Stage]) -> Candidate | None:
        """The best candidate of the first stage in which one should fit."""
        wish = self._space.wish
        if among and self._should_fit(wish):
            return wish
        self._outlook.look([stage.lightest for stage in among])
        for stage in among:
            # Where not even the lightest fits, or nobody can say, the others need not be asked.
            best = self._best_in(stage) if self._may_fit(stage.lightest) else None
            if best is not None:
                return best
        return None

    def _best_in(self, stage: Stage) -> Candidate | None:
        """The fastest candidate of a stage that should fit; where speeds are not known, the first that should."""
        if not self._outlook.knows_speeds:
            return next(filter(self._should_fit, self._looked_at(stage.candidates)), None)
        self._outlook.look(stage.candidates)
        speeds = {c: self._speed(c) for c in stage.candidates if self._should_fit(c)}
        if not speeds:
            return None
        enough = _AS_FAST * max(speeds.values())
        as_fast = [c for c, speed in speeds.items() if speed >= enough]
        return min(as_fast, key=lambda c: (given_up(c, self._space.wish), -speeds[c]))

    def _looked_at(self, candidates: Sequence[Candidate]) -> Iterator[Candidate]:
        """The candidates in their order, estimated as far as they are taken."""
        for start in range(0, len(candidates), _AT_ONCE):
            some = candidates[start : start + _AT_ONCE]
            self._outlook.look(some)
            yield from some

    def _need(self, candidate: Candidate) -> int | None:
        """Corrected bytes on the device; None where there is no estimate."""
        known = self._outlook.of(candidate)
        return None if known is None else self._correction.need(known)

    def _speed(self, candidate: Candidate) -> float:
        """Tokens a second: measured, or estimated and corrected."""
        trial = self._facts.tried(candidate)
        if trial is not None and trial.result.tokens_per_second:
            return trial.result.tokens_per_second
        known = self._outlook.of(candidate)
        return self._correction.speed(known) if known is not None else 0.0

    def _may_fit(self, candidate: Candidate) -> bool:
        """As `_should_fit`, but a candidate that cannot be used may still say something about its stage."""
        if self._facts.verdict(candidate) is Verdict.UNUSABLE:
            return True
        return self._should_fit(candidate)

    def _should_fit(self, candidate: Candidate) -> bool:
        verdict = self._facts.verdict(candidate)
        if verdict in (Verdict.TOO_BIG, Verdict.UNUSABLE):
            return False
        need = self._need(candidate)
        return need is not None and (verdict is Verdict.FITS or need <= self._usable_bytes)

    def _pays(self, candidate: Candidate) -> bool:
        """Whether a candidate promises more than the fastest of those that were measured and give up as little."""
        fits = self._first_fit()
        if fits is None or not self._outlook.knows_speeds:
            return True
        return self._speed(candidate) >= WORTH * self._speed(fastest(self._facts, fits[1], self._space.wish).candidate)

    def _last_resort(self) -> Choice | None:
        """Nothing should fit any more: the one that needs least, for estimates may be wrong, but not by any amount."""
        lightest = [self._space.wish, *(stage.lightest for stage in self._stages)]
        self._outlook.look(lightest)
        open_ones = [c for c in lightest if self._facts.verdict(c) in (Verdict.UNKNOWN, Verdict.FITS)]
        needs = {c: known.device_bytes for c in open_ones if (known := self._outlook.of(c)) is not None}
        if self._facts.trials:
            needs = {c: need for c, need in needs.items() if need <= _HOPE * self._usable_bytes}
        if not needs:
            return None
        return self._choice(min(needs, key=lambda c: needs[c]), "the last resort: it should need least")

    def _nothing_fits(self) -> SearchOutcome:
        trials = tuple(self._facts.trials)
        misses = {t: self._missed_need(t) for t in trials if t.result.status is TrialStatus.OOM}
        if not misses:
            return SearchOutcome(winner=None, rung=None, trials=trials)
        nearest = min(misses, key=lambda t: misses[t])
        return SearchOutcome(
            winner=None, rung=None, trials=trials, nearest_miss=nearest, nearest_miss_bytes=misses[nearest]
        )

    def _missed_need(self, trial: Trial) -> int:
        need = self._need(trial.candidate) or trial.result.projected_bytes or 0
        return max(need, self._usable_bytes + 1)


class _Outlook:
    """The estimates so far; each candidate is asked for once."""

    def __init__(self, forecaster: Forecaster) -> None:
        self._forecaster = forecaster
        self._answers: dict[Candidate, Prediction | str] = {}
        self.knows_speeds = False

    def look(self, candidates: Sequence[Candidate]) -> None:
        """Has these estimated.

        Raises:
            NoForecast: no candidate so far can be.
        """
        asked = [c for c in dict.fromkeys(candidates) if c not in self._answers]
        if not asked:
            return
        self._answers.update(zip(asked, self._forecaster.predict(asked), strict=True))
        predictions = [p for p in self._answers.values() if isinstance(p, Prediction)]
        self.knows_speeds = any(p.tokens_per_second is not None for p in predictions)
        if not predictions and len(self._answers) > 1:
            raise NoForecast(next(why for why in self._answers.values() if isinstance(why, str)))

    def of(self, candidate: Candidate) -> Prediction | None:
        answer = self._answers.get(candidate)
        return answer if isinstance(answer, Prediction) else None
