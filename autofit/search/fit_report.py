"""What a search found, for people and machines: what was chosen, what was given up, predicted and measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from autofit.search.outcome import SearchOutcome, SearchSpace, Trial
from autofit.space.budget import MemoryBudget
from autofit.space.candidate import KNOBS, LOSSY, Candidate
from autofit.space.cards import CHEAPEST_FIRST
from autofit.space.facts import DeviceFacts
from autofit.space.ladder import RUNGS, knob_values
from autofit.space.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class GivenUp:
    """One knob that was stepped down. `cost` says what it costs; empty where the result is the same."""

    knob: str
    wished: int | str
    chosen: int | str
    lossy: bool
    cost: str = ""


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """The chosen candidate and how it was found. Sizes in bytes.

    Attributes:
        winner: the measured trial of the chosen candidate.
        seconds_estimated: how long the training will take, going by the trial's speed.
    """

    device: DeviceFacts
    budget: MemoryBudget
    wish: Candidate
    winner: Trial
    given_up: tuple[GivenUp, ...]
    trials: tuple[Trial, ...]
    num_examples: int
    data_fingerprint: str
    optimizer_steps: int
    seconds_estimated: float | None

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types: `plan.json`."""
        return {
            "device": self.device.to_json(),
            "budget": {**asdict(self.budget), "usable_bytes": self.budget.usable_bytes},
            "wish": self.wish.to_json(),
            "chosen": self.winner.candidate.to_json(),
            "predicted_bytes": self.winner.predicted_bytes,
            "measured": self.winner.result.to_json(),
            "given_up": [asdict(g) for g in self.given_up],
            "trials": [_trial_json(trial) for trial in self.trials],
            "num_examples": self.num_examples,
            "data_fingerprint": self.data_fingerprint,
            "optimizer_steps": self.optimizer_steps,
            "seconds_estimated": self.seconds_estimated,
        }


def _trial_json(trial: Trial) -> dict[str, Any]:
    known = {"number": trial.number, "predicted_bytes": trial.predicted_bytes}
    return {**trial.candidate.to_json(), **trial.result.to_json(), **known}


def given_up(wish: Candidate, chosen: Candidate, sequence_cost: str) -> tuple[GivenUp, ...]:
    """The knobs in which a candidate differs from the wish. `sequence_cost`: what a shorter sequence cuts."""
    costs = {
        "max_seq_length": sequence_cost,
        "quantization_bits": f"the frozen weights are rounded to {chosen.quantization_bits} bits",
        "lora_rank": f"the adapter has {chosen.lora_rank / wish.lora_rank:.0%} of the wished parameters",
    }
    return tuple(
        GivenUp(
            knob=knob,
            wished=getattr(wish, knob),
            chosen=getattr(chosen, knob),
            lossy=knob in LOSSY,
            cost=costs.get(knob, ""),
        )
        for knob in KNOBS
        if getattr(wish, knob) != getattr(chosen, knob)
    )


def why_nothing_fits(outcome: SearchOutcome, space: SearchSpace, budget: MemoryBudget, device: DeviceFacts) -> str:
    """One line: the nearest miss, what it would need, and which knob or card would do."""
    nearest = outcome.nearest_miss
    if nearest is None:
        last = outcome.trials[-1].result
        return f"no trial ran to its end; the last was {last.status.value} in {last.phase}: {last.message}"
    c = nearest.candidate
    need = outcome.nearest_miss_bytes
    seen = (nearest.result.peak_allocated_bytes or 0) + (nearest.result.requested_bytes or 0)
    least = max(budget.total_bytes, seen)
    need = max(need, least) if need else None
    needs = f"about {format_bytes(need)}" if need else f"more than {format_bytes(least)}"
    text = (
        f"nothing fits {format_bytes(budget.total_bytes)}; the nearest miss (micro-batch {c.micro_batch_size}, length "
        f"{c.max_seq_length}, {c.checkpointed_layers} layers checkpointed, {c.quantization_bits} bits, rank "
        f"{c.lora_rank}) needs {needs}"
    )
    held, mem = held_knobs(space), "--gpu-mem"
    hints = [f"free {' or '.join(held)}"] if held else []
    if space.limits.stock:  # a script asked, by `fit`, which releases only what changes the result
        search = ", ".join(f'"{name}"' for name, knob in RUNGS.items() if knob in held and knob in LOSSY)
        hints, mem = [f"release more by autofit.fit(…, search=[{search}])"] if search else [], "gpu_mem"
    if device.type == "cuda" and need:
        fitting = [card.name for card in CHEAPEST_FIRST if card.total_bytes > need * 1.05]
        hints += [f"use a larger {mem} or a card like {fitting[0]}"] if fitting else []
    else:
        hints.append(f"use {mem} {-(-need * 21 // (20 * 10**6))}MB" if need else f"use a larger {mem}")
    return f"{text}; {', or '.join(hints)}" if hints else text


def held_knobs(space: SearchSpace) -> list[str]:
    """Knobs that the user's pins, minima, consent or order kept from stepping down further."""
    freed = type(space.limits)(
        global_batch_size=space.limits.global_batch_size,
        checkpointable_layers=space.limits.checkpointable_layers,
        can_page=space.limits.can_page,
        can_quantize=space.limits.can_quantize,
        stock=space.limits.stock,
    )
    held = []
    for name, knob in RUNGS.items():
        now = knob_values(knob, space.wish, space.limits) if name in space.order else [getattr(space.wish, knob)]
        if len(knob_values(knob, space.wish, freed)) > len(now):
            held.append(knob)
    return held
