"""The big sweep: `python -m tests.search.sweep 5000` prints how many trials searches take and what they find."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from autofit.search.controller import SearchSpace, measure

from .landscapes import Landscape, MemoryStore, budget_of, exhaustive, plausible, wild

Maker = Callable[[random.Random], tuple[SearchSpace, Landscape]]
KINDS: dict[str, Maker] = {
    "plausible": plausible,
    "wild, monotone": lambda rng: wild(rng, monotone_bits=True),
    "wild, arbitrary bits": lambda rng: wild(rng, monotone_bits=False),
}


@dataclass
class Tally:
    trials: Counter[int] = field(default_factory=Counter)
    descents: Counter[int] = field(default_factory=Counter)
    rungs_as_exhaustive: int = 0
    growths: int = 0
    growths_that_fit: int = 0
    gains: list[float] = field(default_factory=list)


def sweep(kind: str, searches: int, seed: int = 0) -> Tally:
    tally = Tally()
    for i in range(searches):
        rng = random.Random(f"{kind} {seed} {i}")
        space, landscape = KINDS[kind](rng)
        growing: list[bool] = []
        outcome = measure(
            space,
            budget_of(landscape.usable),
            landscape,
            MemoryStore(),
            lambda e, growing=growing: growing.append(e.reason.startswith("grows")) if e.kind == "end" else None,
        )
        tally.trials[len(outcome.trials)] += 1
        tally.descents[growing.count(False)] += 1
        best = exhaustive(space, landscape)
        tally.rungs_as_exhaustive += (outcome.rung.candidate if outcome.rung else None) == best
        grown = [t for t, g in zip(outcome.trials, growing, strict=True) if g]
        tally.growths += len(grown)
        tally.growths_that_fit += sum(t.result.status == "FIT" for t in grown)
        if grown and outcome.winner and outcome.rung:
            tally.gains.append(landscape.speed(outcome.winner.candidate) / landscape.speed(outcome.rung.candidate))
    return tally


def main(searches: int) -> None:
    for kind in KINDS:
        tally = sweep(kind, searches)
        total = sum(tally.trials.values())
        few = sum(n for t, n in tally.trials.items() if t <= 4)
        print(f"{kind}: {total} searches")
        print("  trials      ", dict(sorted(tally.trials.items())), f"<=4: {few / total:.1%}")
        print("  of them down", dict(sorted(tally.descents.items())))
        print(f"  rung as exhaustive: {tally.rungs_as_exhaustive / total:.2%}")
        gains = sorted(tally.gains) or [1.0]
        print(f"  growths that fit: {tally.growths_that_fit}/{tally.growths}", end="; ")
        print(f"speed after growth: median {gains[len(gains) // 2]:.2f}, mean {sum(gains) / len(gains):.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
