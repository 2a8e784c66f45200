"""The whole space behind the ladder, in stages: what may be given up before the next thing that changes the result."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from autofit.space.candidate import LOSSLESS, Candidate
from autofit.space.ladder import DEFAULT_ORDER, RUNGS, Limits, knob_values, with_knob


@dataclass(frozen=True)
class Stage:
    """Candidates with the same lossy values: all combinations of the lossless knobs that the order has reached.

    Attributes:
        candidates: none of them in an earlier stage; what gives up least by the order stands first.
        lightest: the one with every lossless knob at its end.
    """

    candidates: tuple[Candidate, ...]
    lightest: Candidate


def stages(wish: Candidate, limits: Limits, order: tuple[str, ...] = DEFAULT_ORDER) -> tuple[Stage, ...]:
    """The stages from the wish down. The first holds the wish; every candidate of the ladder is in one of them."""
    found: list[Stage] = []
    seen: set[Candidate] = set()
    free: list[str] = []

    def add(base: Candidate) -> None:
        combined = _combinations(base, free, wish, limits)
        fresh = tuple(c for c in dict.fromkeys(combined) if c not in seen)
        if fresh:
            seen.update(fresh)
            found.append(Stage(fresh, combined[-1]))

    base = wish
    for name in order:
        knob = RUNGS[name]
        if knob in LOSSLESS:
            free.append(knob)
            continue
        add(base)
        for value in knob_values(knob, wish, limits)[1:]:
            base = with_knob(base, knob, value, limits)
            add(base)
    add(base)
    return tuple(found)


def _combinations(base: Candidate, free: list[str], wish: Candidate, limits: Limits) -> list[Candidate]:
    """All values of the free knobs; the first of them varies fastest, so that the last is given up last."""
    knobs = free[::-1]
    values = product(*(_values(knob, wish, limits) for knob in knobs))
    # All at once: what is offloaded depends on what is checkpointed.
    return [base.replace(**dict(zip(knobs, chosen, strict=True))) for chosen in values]


def _values(knob: str, wish: Candidate, limits: Limits) -> list[int | str]:
    """As the ladder's, but checkpointing moves by eighths of the layers: an estimate costs less than a trial."""
    values = knob_values(knob, wish, limits)
    if knob != "checkpointed_layers" or len(values) == 1:
        return values
    layers = limits.checkpointable_layers
    eighths = {layers * part // 8 for part in range(1, 9)}
    return [wish.checkpointed_layers, *sorted(n for n in eighths if n > wish.checkpointed_layers)]
