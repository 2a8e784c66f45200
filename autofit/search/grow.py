"""Back up again: once a rung fits, the lossless knobs that were given up on the way are grown as far as they pay.

The rung's lossy values stay. A growth is one joint candidate: all that is predicted to fit, in order of preference.
"""

from __future__ import annotations

from collections.abc import Iterator

from autofit.search.attempts import Choice
from autofit.search.facts import Facts, Verdict
from autofit.search.outcome import SearchSpace, Trial
from autofit.search.predict import Predictor
from autofit.space.candidate import LOSSLESS, LOSSY, Candidate
from autofit.space.ladder import knob_values, with_knob
from autofit.trial.result import TrialStatus

# A growth must make a step so much faster to be followed by another.
WORTH = 1.03
# Offloading and recomputing always cost time; a larger micro-batch only helps where the device is not full.
DIRECTIONS = (
    ("offload_activations", "checkpointed_layers", "micro_batch_size", "optimizer"),
    ("offload_activations", "micro_batch_size", "checkpointed_layers", "optimizer"),
)
_OOMS_A_DIRECTION = 2
# With so many tokens at once a device is busy: rows instead of less recomputing would not pay.
_BUSY_TOKENS = 4096


def fastest(facts: Facts, rung: Trial, wish: Candidate) -> Trial:
    """The fastest measured trial with the rung's lossy values; of equals, the one that gave up least."""
    lossy = [getattr(rung.candidate, knob) for knob in LOSSY]
    fits = [t for t in facts.trials if t.result.status is TrialStatus.FIT]
    same = [t for t in fits if [getattr(t.candidate, knob) for knob in LOSSY] == lossy]
    return max(same, key=lambda t: (_speed(t), *(-g for g in given_up(t.candidate, wish)), -t.number))


def given_up(candidate: Candidate, wish: Candidate) -> tuple[int, int, int]:
    """How far from the wish: knobs that differ, layers checkpointed besides, rows fewer."""
    differing = sum(getattr(candidate, knob) != getattr(wish, knob) for knob in (*LOSSLESS, *LOSSY))
    layers = candidate.checkpointed_layers - wish.checkpointed_layers
    return differing, layers, wish.micro_batch_size - candidate.micro_batch_size


def _speed(trial: Trial) -> float:
    return trial.result.tokens_per_second or 0.0


class Growth:
    """Proposes growths of a rung one by one; `choose` reads what came of the last one from the facts."""

    def __init__(self, space: SearchSpace, facts: Facts, predictor: Predictor, rung: Trial) -> None:
        self._space, self._facts, self._predictor, self._rung = space, facts, predictor, rung
        self._directions = iter(DIRECTIONS)
        self._direction: tuple[str, ...] | None = next(self._directions)
        self._at = rung
        self._last: Candidate | None = None
        self._ooms = 0
        self._traded = False

    def choose(self) -> Choice | None:
        """The next growth to try; None when nothing more is predicted to fit or to pay."""
        self._learn()
        while self._direction is not None:
            grown = self._grown(self._at.candidate, self._direction)
            if self._worth_trying(grown):
                self._last = grown
                return Choice(grown, "grows back what fits", self._predictor.need(grown))
            self._turn()
        return self._trade()

    def _trade(self) -> Choice | None:
        """Once: every layer recomputed for many more rows. It pays where a few rows leave the device waiting."""
        limits, rung = self._space.limits, self._rung.candidate
        most = knob_values("checkpointed_layers", self._space.wish, limits)[-1]
        if self._traded or "checkpointing" not in self._space.order or rung.checkpointed_layers == most:
            return None
        self._traded = True
        grown = self._grown(with_knob(rung, "checkpointed_layers", most, limits), ("micro_batch_size",))
        if self._facts.tried(grown) is not None or not self._doubles_rows(grown):
            return None
        return Choice(grown, "more rows for less kept", self._predictor.need(grown))

    def _learn(self) -> None:
        trial = self._facts.tried(self._last) if self._last is not None else None
        if trial is None:
            return
        if trial.result.status is TrialStatus.FIT:
            pays = _speed(trial) >= WORTH * _speed(self._at)
            self._at = trial if pays else self._at
            if not pays:
                self._turn()
        else:
            self._ooms += 1
            if trial.result.status is not TrialStatus.OOM or self._ooms >= _OOMS_A_DIRECTION:
                self._turn()

    def _turn(self) -> None:
        """To the next direction, from the rung again."""
        self._direction = next(self._directions, None)
        self._at, self._last, self._ooms = self._rung, None, 0

    def _grown(self, candidate: Candidate, direction: tuple[str, ...]) -> Candidate:
        for knob in direction:
            candidate = next((c for c in self._larger(candidate, knob) if self._should_fit(c)), candidate)
        return candidate

    def _larger(self, candidate: Candidate, knob: str) -> Iterator[Candidate]:
        """The candidate with a knob nearer to the wish, nearest first. Checkpointing moves by single layers."""
        limits, wish = self._space.limits, self._space.wish
        now = getattr(candidate, knob)
        values: list[int | str] = knob_values(knob, wish, limits)
        if knob == "checkpointed_layers":
            values = list(range(wish.checkpointed_layers, now))
        elif now in values:
            values = values[: values.index(now)]
        for value in values:
            yield with_knob(candidate, knob, value, limits)

    def _should_fit(self, candidate: Candidate) -> bool:
        if self._facts.verdict(candidate) is not Verdict.UNKNOWN:
            return self._facts.verdict(candidate) is Verdict.FITS
        need = self._predictor.cautious_need(candidate)
        return need is not None and need <= self._facts.usable_bytes

    def _worth_trying(self, grown: Candidate) -> bool:
        if self._facts.tried(grown) is not None:
            return False
        at = self._at.candidate
        if grown.replace(checkpointed_layers=at.checkpointed_layers) != at:
            return self._direction is DIRECTIONS[0] or self._doubles_rows(grown)
        # Recomputing all layers costs a third of a step, so an eighth of them about 4 %.
        fewer = at.checkpointed_layers - grown.checkpointed_layers
        return self._direction is DIRECTIONS[0] and fewer >= max(1, self._space.limits.checkpointable_layers // 8)

    def _doubles_rows(self, grown: Candidate) -> bool:
        so_far = fastest(self._facts, self._rung, self._space.wish).candidate
        return grown.micro_batch_size >= 2 * so_far.micro_batch_size and so_far.token_budget < _BUSY_TOKENS
