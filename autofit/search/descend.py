"""Down the ladder: which candidate to try next, so that the first one that fits is found within the bound.

Within equal bits the ladder only ever needs less, so a fit says that all below fit and an OOM that none above do.
Across bits nothing follows: each stretch of equal bits is closed by itself, from the top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import groupby

from autofit.search.attempts import Choice
from autofit.search.facts import Facts, Verdict
from autofit.search.predict import Predictor
from autofit.space.candidate import Candidate
from autofit.trial.result import TrialStatus

# After so many predictions proved wrong at the same bits, the stretch is halved instead.
TOLERATED_MISSES = 2


def first_fit(chain: Sequence[Candidate], facts: Facts) -> Candidate | None:
    """The first candidate of the chain that was tried and fits."""
    return next((c for c in chain if (t := facts.tried(c)) and t.result.status is TrialStatus.FIT), None)


def open_candidates(chain: Sequence[Candidate], facts: Facts) -> list[Candidate]:
    """Those above the first fit of which it is not known that they do not fit: trying them may save a step down."""
    fit = first_fit(chain, facts)
    above = chain[: chain.index(fit)] if fit is not None else chain
    return [c for c in above if facts.verdict(c) in (Verdict.UNKNOWN, Verdict.FITS) and not facts.tried(c)]


def choose(chain: Sequence[Candidate], facts: Facts, predictor: Predictor, trials_left: int) -> Choice | None:
    """What to try next; None once the first fit of the chain is known, or that there is none."""
    candidates = open_candidates(chain, facts)
    if not candidates:
        return None
    stretches = [list(group) for _, group in groupby(candidates, key=lambda c: c.quantization_bits)]
    if trials_left == 1 and first_fit(chain, facts) is None:
        return Choice(candidates[-1], "the last resort", predictor.need(candidates[-1]))
    stretch, rest = stretches[0], tuple(len(s) for s in stretches[1:])
    wanted, reason = _wanted(stretch, facts, predictor)
    place = _affordable(wanted, len(stretch), rest, trials_left)
    if place != wanted:
        reason = "halves what is left"
    candidate = stretch[place - 1]
    return Choice(candidate, reason, predictor.need(candidate))


def _wanted(stretch: list[Candidate], facts: Facts, predictor: Predictor) -> tuple[int, str]:
    """The place (from 1) in a stretch of equal bits that one would try if trials were free."""
    bits = stretch[0].quantization_bits
    if all(t.candidate.quantization_bits != bits for t in facts.trials):
        return 1, f"the first at {bits} bits"
    too_low, too_high = misses(facts, bits)
    predict = predictor.cautious_need if too_low else predictor.need
    needs = [predict(c) for c in stretch]
    if None in needs:
        return _middle(stretch, predictor), "nothing measured yet: halves what is left"
    if too_low > TOLERATED_MISSES or too_high >= TOLERATED_MISSES:
        return (len(stretch) + 1) // 2, "predictions failed: halves what is left"
    for place, need in enumerate(needs, start=1):
        if need is not None and need <= facts.usable_bytes:
            return place, "the first predicted to fit"
    return len(stretch), f"makes sure of {bits} bits: none above should fit"


def _middle(stretch: list[Candidate], predictor: Predictor) -> int:
    """The place whose activations are nearest the geometric mean of the first's and the last's."""
    logs = [math.log(predictor.activations(c)) for c in stretch]
    middle = (logs[0] + logs[-1]) / 2
    return min(range(len(logs)), key=lambda i: (abs(logs[i] - middle), i)) + 1


def misses(facts: Facts, bits: int) -> tuple[int, int]:
    """How often the prediction before a trial at these bits was too low, so that it did not fit, and too high."""
    wrong = [t.result.status for t in facts.mispredicted if t.candidate.quantization_bits == bits]
    return wrong.count(TrialStatus.OOM), wrong.count(TrialStatus.FIT)


def _affordable(wanted: int, length: int, rest: tuple[int, ...], trials_left: int) -> int:
    """The place nearest to the wanted one after which the bound still holds, whatever the trial says."""
    costs = {place: _worst_after(place, length, rest) for place in range(1, length + 1)}
    within = [place for place, cost in costs.items() if 1 + cost <= trials_left]
    if within:
        return min(within, key=lambda place: (abs(place - wanted), -place))
    return min(costs, key=lambda place: (costs[place], -place))


def _worst_after(place: int, length: int, rest: tuple[int, ...]) -> int:
    """Trials still needed at worst once the candidate at `place` was tried: it fits, or it does not."""
    return max(math.ceil(math.log2(place)), worst_case((length - place, *rest)))


@cache
def worst_case(lengths: tuple[int, ...]) -> int:
    """Trials that suffice, whatever they say, for stretches with so many open candidates."""
    if not lengths:
        return 0
    if lengths[0] == 0:
        return worst_case(lengths[1:])
    return 1 + min(_worst_after(place, lengths[0], lengths[1:]) for place in range(1, lengths[0] + 1))
