"""Whoever tells the user what happens, and what a run tells before it searches."""

from __future__ import annotations

from typing import Any, Protocol

from autofit.config import RunConfig
from autofit.search.fit_report import FitReport
from autofit.search.outcome import TrialEvent
from autofit.space.budget import MemoryBudget
from autofit.space.candidate import Candidate
from autofit.space.units import format_bytes
from autofit.training.question import Prepared


class Narrator(Protocol):
    """Whoever tells the user what happens."""

    def say(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def trial(self, event: TrialEvent) -> None: ...
    def plan(self, report: FitReport) -> None: ...
    def training(self, record: dict[str, Any]) -> None: ...


def announce(narrator: Narrator, config: RunConfig, prepared: Prepared, budget: MemoryBudget, wish: Candidate) -> None:
    """Says what a search starts from: device and budget, model, data, and what is given up from the start."""
    device, data, model = prepared.device, prepared.data, prepared.model
    if budget.clamped_from_bytes is not None:
        narrator.warn(
            f"the budget of {format_bytes(budget.clamped_from_bytes)} is more than there is; "
            f"using all {format_bytes(budget.total_bytes)} of {device.name}"
        )
    headroom = f", {format_bytes(budget.headroom_bytes)} headroom" if budget.headroom_bytes else ""
    narrator.say(f"device   {device.name}, budget {format_bytes(budget.total_bytes)}{headroom}")
    name = config.model or "embedded"
    narrator.say(f"model    {name} ({model.architecture}), {parameter_count(model.num_parameters)} parameters")
    dropped = f", {data.dropped_examples} without anything to train on left out" if data.dropped_examples else ""
    narrator.say(f"data     {data.num_examples:,} examples, at most {data.longest:,} tokens{dropped}")
    if wish.pace_length is not None:
        longer = sum(length > wish.pace_length for length in data.lengths)
        narrator.say(
            f"         {longer:,} of them are longer than {wish.pace_length:,}: where a micro-batch is for fewer, "
            "they run alone, recomputing all layers (same result)"
        )
    for note in starts_lower(config, prepared, wish):
        narrator.warn(note)


def starts_lower(config: RunConfig, prepared: Prepared, wish: Candidate) -> list[str]:
    """What the wish itself gives up, and why."""
    data, model = prepared.data, prepared.model
    notes = []
    if wish.quantization_bits == 4 and config.quantization_bits is None and model.quantized_bits is None:
        notes.append(
            f"starts at 4 bits: the 16-bit weights would take {format_bytes(model.weight_bytes_16bit)}, "
            "more than half the budget"
        )
    longest = wish.max_seq_length
    if data.longest > longest:
        examples, share = data.truncation_cost(longest)
        notes.append(
            f"sequences are cut to {longest:,} tokens: {examples:,} of {data.num_examples:,} examples "
            f"and {share:.1%} of the trained tokens are cut"
        )
    return notes


def parameter_count(parameters: int) -> str:
    return f"{parameters / 1e9:,.2f} B" if parameters >= 10**9 else f"{parameters / 1e6:,.1f} M"
