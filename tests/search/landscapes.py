"""Simulated devices with a known truth, for the search: no tensor, no process, microseconds a trial."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace

from autofit.search.facts import needs_at_least
from autofit.search.outcome import SearchSpace, Trial, TrialEvent
from autofit.space.budget import MemoryBudget
from autofit.space.candidate import OFFLOADING, Candidate
from autofit.space.ladder import Limits, ladder
from autofit.trial.result import TrialResult, TrialStatus

GB = 10**9


@dataclass
class MemoryStore:
    """A store that forgets. Fails the test where the search repeats itself."""

    trials: dict[Candidate, Trial] = field(default_factory=dict)
    running: dict[int, Candidate] = field(default_factory=dict)

    def finished(self, candidate: Candidate) -> Trial | None:
        return self.trials.get(candidate)

    def begin(self, candidate: Candidate) -> int:
        number = len(self.trials)
        self.running[number] = candidate
        return number

    def end(self, number: int, result: TrialResult) -> None:
        candidate = self.running.pop(number)
        self.trials[candidate] = Trial(number=number, candidate=candidate, result=result)

    def abandon(self, number: int) -> None:
        del self.running[number]


@dataclass
class Landscape:
    """Needs by a formula that is not the predictor's, all of it monotone within equal bits.

    `base` is by bits; `grain` rounds needs up (kinks, as an allocator makes them); `square` is bytes per token pair;
    `reports` says how much an OOM tells: "nothing", "static", "projection" or "both"; `error` is the projection's.
    """

    usable: int
    layers: int
    base: dict[int, float]
    per_token: float
    kept: float
    floor: float  # activations that no checkpointing saves, bytes per token
    rank_bytes: float
    square: float = 0.0
    grain: int = 1
    offload: tuple[float, float] = (0.7, 0.4)
    reports: str = "both"
    error: float = 0.0
    saturation: float = 500.0  # tokens at which the device is half busy
    runs: list[Candidate] = field(default_factory=list)

    def static(self, c: Candidate) -> int:
        return int(self.base[c.quantization_bits] + self.rank_bytes * c.lora_rank)

    def need(self, c: Candidate) -> int:
        share = c.checkpointed_layers / self.layers
        level = OFFLOADING.index(c.offload_activations)
        kept = self.kept * (self.offload[0] if level else 1)
        activations = self.per_token * (1 - share * (1 - kept)) * (self.offload[1] if level == 2 else 1)
        work = c.token_budget * (activations + self.floor) + self.square * c.token_budget * c.max_seq_length
        optimizer = self.rank_bytes * c.lora_rank * (1 if c.optimizer.startswith("paged") else 3)
        exact = self.static(c) + work + optimizer
        return math.ceil(exact / self.grain) * self.grain

    def speed(self, c: Candidate) -> float:
        busy = c.token_budget / (c.token_budget + self.saturation)
        slow = (1 + c.checkpointed_layers / self.layers / 3) * (1, 1.2, 1.6)[OFFLOADING.index(c.offload_activations)]
        return 10_000 * busy / slow / (1.05 if c.optimizer.startswith("paged") else 1)

    def run(self, c: Candidate) -> TrialResult:
        self.runs.append(c)
        need, static = self.need(c), self.static(c)
        if need <= self.usable:
            return TrialResult(
                status=TrialStatus.FIT,
                phase="done",
                static_bytes=static,
                peak_allocated_bytes=need,
                peak_reserved_bytes=need,
                device_bytes=need,
                tokens_per_second=self.speed(c),
                seconds=1.0,
            )
        if static > self.usable:
            return TrialResult(status=TrialStatus.OOM, phase="build")
        projection = int(need * (1 + self.error * math.sin(need)))
        return TrialResult(
            status=TrialStatus.OOM,
            phase="forward",
            static_bytes=static if self.reports in ("static", "both") else None,
            projected_bytes=projection if self.reports in ("projection", "both") else None,
        )


@dataclass
class Thresholds:
    """The hardest landscape: by bits, the first rung that fits, wherever it is, and projections that lie.

    A candidate fits when it needs no more than that rung. Anything measured is noise from `lies`.
    """

    usable: int
    chain: tuple[Candidate, ...]
    first: dict[int, Candidate | None]
    lies: random.Random
    tells: bool = True
    runs: list[Candidate] = field(default_factory=list)

    def fits(self, c: Candidate) -> bool:
        first = self.first.get(c.quantization_bits)
        return first is not None and needs_at_least(first, c)

    def run(self, c: Candidate) -> TrialResult:
        self.runs.append(c)
        if self.fits(c):
            need = int(self.usable * self.lies.uniform(0.1, 1))
            return TrialResult(
                status=TrialStatus.FIT, phase="done", device_bytes=need, tokens_per_second=self.lies.uniform(1, 9)
            )
        return TrialResult(
            status=TrialStatus.OOM,
            phase="forward",
            static_bytes=int(self.usable * self.lies.uniform(0, 1)) if self.tells else None,
            projected_bytes=int(self.usable * self.lies.uniform(0.5, 4)) if self.tells else None,
        )


def default_space(
    *, length: int = 2048, rank: int = 16, bits: int = 16, layers: int = 32, rows: int = 16, order: tuple[str, ...] = ()
) -> SearchSpace:
    wish = Candidate(micro_batch_size=rows, max_seq_length=length, lora_rank=rank, quantization_bits=bits)
    limits = Limits(global_batch_size=rows, checkpointable_layers=layers, can_page=True)
    return SearchSpace(wish=wish, limits=limits, **({"order": order} if order else {}))


def chain_of(space: SearchSpace) -> tuple[Candidate, ...]:
    return ladder(space.wish, space.limits, space.order)


def budget_of(usable: int) -> MemoryBudget:
    return MemoryBudget(total_bytes=usable)


def exhaustive(space: SearchSpace, landscape: Landscape) -> Candidate | None:
    """The first rung that fits, by trying all."""
    return next((c for c in chain_of(space) if landscape.need(c) <= landscape.usable), None)


def plausible(rng: random.Random) -> tuple[SearchSpace, Landscape]:
    """A model of 1 to 14 billion parameters on a card of 8 to 80 GB, the wish as the product makes it."""
    parameters = 10 ** rng.uniform(0, 1.15) * GB
    layers = rng.choice((16, 24, 28, 32, 40))
    hidden = math.sqrt(parameters / (12 * layers))
    usable = int(rng.choice((8, 12, 16, 24, 40, 48, 80)) * GB * rng.uniform(0.9, 0.98))
    bits = 16 if 2 * parameters <= usable / 2 else 4
    length = rng.choice((256, 512, 1024, 2048, 4096, 8192))
    context = rng.uniform(0.3, 0.6) * GB
    landscape = Landscape(
        usable=usable,
        layers=layers,
        base={16: 2 * parameters + context, 8: 1.15 * parameters + context, 4: 0.62 * parameters + context},
        per_token=layers * hidden * rng.uniform(12, 34),
        kept=rng.uniform(0.04, 0.15),
        floor=hidden * rng.uniform(20, 100),
        rank_bytes=layers * hidden * 14 * 4,
        square=rng.choice((0, 0, 0, hidden * 0.01)),
        grain=rng.choice((1, 2**20, 2**25)),
        reports=rng.choice(("both", "both", "both", "static")),
        error=rng.uniform(0, 0.08),
        saturation=rng.uniform(100, 1500),
    )
    return default_space(length=length, bits=bits, layers=layers), landscape


def wild(rng: random.Random, *, monotone_bits: bool) -> tuple[SearchSpace, Landscape]:
    """Any proportions. Without `monotone_bits`, bases at 16, 8 and 4 bits have nothing to do with each other."""
    usable = int(10 ** rng.uniform(6, 11))
    bases = [usable * rng.uniform(0.0, 1.3) for _ in range(3)]
    if monotone_bits:
        bases.sort(reverse=True)
    space = default_space(
        length=rng.choice((64, 200, 1000, 2048, 5000)),
        rank=rng.choice((8, 16)),
        bits=rng.choice((16, 16, 16, 4)),
        layers=rng.choice((1, 2, 4, 30, 32)),
        rows=rng.choice((1, 4, 10, 16)),
    )
    if rng.random() < 0.2:
        wished = rng.randint(1, space.limits.checkpointable_layers)
        space = replace(space, wish=space.wish.replace(checkpointed_layers=wished))
    tokens = space.wish.token_budget
    landscape = Landscape(
        usable=usable,
        layers=space.limits.checkpointable_layers,
        base=dict(zip((16, 8, 4), bases, strict=True)),
        per_token=usable / tokens * 10 ** rng.uniform(-1.5, 2.5),
        kept=rng.uniform(0.01, 0.9),
        floor=usable / tokens * 10 ** rng.uniform(-3, 1.5),
        rank_bytes=usable / space.wish.lora_rank * 10 ** rng.uniform(-4, -0.5),
        square=rng.choice((0.0, usable / tokens / space.wish.max_seq_length * 10 ** rng.uniform(-1, 2))),
        grain=rng.choice((1, max(1, usable // 100), max(1, usable // 15))),
        offload=(rng.uniform(0.1, 1), rng.uniform(0.05, 1)),
        reports=rng.choice(("nothing", "static", "projection", "both")),
        error=rng.choice((0.0, 0.1, 0.5)),
        saturation=tokens * 10 ** rng.uniform(-3, 1),
    )
    return space, landscape


def ignore(event: TrialEvent) -> None:
    pass
