"""The planned search: the estimates choose, a trial confirms, and what it measured corrects the other estimates.

As in `search.controller`: at most `MAX_TRIALS` trials, no candidate twice, and the winner was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from autofit.search.attempts import Attempts, Choice
from autofit.search.correction import Correction
from autofit.search.facts import Facts, Verdict
from autofit.search.forecast import Forecaster, Prediction
from autofit.search.grow import fastest
from autofit.search.outcome import Observer, Runner, SearchOutcome, SearchSpace, Trial, TrialStore
from autofit.space.budget import MemoryBudget
from autofit.space.candidate import LOSSLESS, OFFLOADING, Candidate
from autofit.space.ladder import RUNGS
from autofit.space.plan_space import plan_rungs
from autofit.trial.result import TrialStatus

# Another candidate must promise to be so much faster than what was measured to be worth a trial.
WORTH = 1.05
# Once something was tried, what is estimated to need more than this share of the usable bytes is not hoped for.
_HOPE = 1.25


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
        self._rungs = plan_rungs(space.wish, space.limits, space.order)
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
            candidate = self._best_of(self._rungs)
            if candidate is None:
                return self._last_resort()
            first = not self._facts.trials
            return self._choice(candidate, "the estimates' choice" if first else "the corrected estimates' choice")
        number, trial = fits
        if trial.candidate == self._space.wish:
            return None
        earlier = self._best_of(self._rungs[:number])
        if earlier is not None:
            return self._choice(earlier, "gives up less, by the corrected estimates")
        faster = self._best_in(self._rungs[number])
        if faster is None or self._facts.tried(faster) or not self._pays(faster):
            return None
        return self._choice(faster, "faster, by the corrected estimates")

    def _choice(self, candidate: Candidate, reason: str) -> Choice:
        return Choice(candidate, reason, self._need(candidate))

    def _first_fit(self) -> tuple[int, Trial] | None:
        """The earliest rung with a trial that fits, and the first such trial."""
        fits = [trial for trial in self._facts.trials if trial.result.status is TrialStatus.FIT]
        found = ((n, t) for n, rung in enumerate(self._rungs) for t in fits if t.candidate in rung)
        return next(found, None)

    def _best_of(self, among: Sequence[list[Candidate]]) -> Candidate | None:
        """The best candidate of the first rung in which one should fit."""
        wish = self._space.wish
        if among and self._should_fit(wish):
            return wish
        for rung in among:
            # Where not even the last of it fits, or nobody can say, the others need not be asked.
            self._outlook.look(rung[-1:])
            best = self._best_in(rung) if self._may_fit(rung[-1]) else None
            if best is not None:
                return best
        return None

    def _best_in(self, rung: list[Candidate]) -> Candidate | None:
        """The fastest candidate of a rung that should fit; where speeds are not known, the first that should."""
        if not self._outlook.knows_speeds:
            return next(filter(self._should_fit, self._looked_at(sorted(rung, key=self._given_up))), None)
        self._outlook.compare(rung)
        fitting = filter(self._should_fit, rung)
        return min(fitting, key=lambda c: (-self._speed(c), self._given_up(c)), default=None)

    def _looked_at(self, candidates: Sequence[Candidate]) -> Iterator[Candidate]:
        """The candidates in their order, estimated as far as they are taken; rows are cheap to estimate together."""
        for _, some in groupby(candidates, key=lambda c: c.replace(micro_batch_size=1)):
            alike = list(some)
            self._outlook.look(alike)
            yield from alike

    def _given_up(self, candidate: Candidate) -> tuple[int, ...]:
        """How far each lossless knob is from the wish, what the order gives up last first."""
        wish = self._space.wish
        far = {
            "micro_batch_size": wish.micro_batch_size - candidate.micro_batch_size,
            "checkpointed_layers": candidate.checkpointed_layers,
            "optimizer": int(candidate.optimizer != wish.optimizer),
            "offload_activations": OFFLOADING.index(candidate.offload_activations),
        }
        return tuple(far[RUNGS[name]] for name in reversed(self._space.order) if RUNGS[name] in LOSSLESS)

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
        """As `_should_fit`, but a candidate that cannot be used may still say something about its rung."""
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
        lightest = [self._space.wish, *(rung[-1] for rung in self._rungs)]
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
    """The estimates so far."""

    def __init__(self, forecaster: Forecaster) -> None:
        self._forecaster = forecaster
        self._answers: dict[Candidate, Prediction | str] = {}
        self._compared: set[Candidate] = set()
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

    def compare(self, candidates: Sequence[Candidate]) -> None:
        """Has these estimated together: what offloading costs is only known beside the same without it."""
        if not self._compared.issuperset(candidates):
            self._compared.update(candidates)
            self._answers.update(zip(candidates, self._forecaster.predict(candidates), strict=True))

    def of(self, candidate: Candidate) -> Prediction | None:
        answer = self._answers.get(candidate)
        return answer if isinstance(answer, Prediction) else None
