"""The plan on a terminal: at most 100 columns and 40 lines."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from autofit.report.words import candidate_words, one_given_up, size_words
from autofit.search.plan import Estimated, Plan, lossy_given_up
from autofit.space.budget import MemoryBudget
from autofit.space.candidate import Candidate
from autofit.space.facts import DataFacts
from autofit.space.units import format_bytes
from autofit.training.narrator import parameter_count
from autofit.training.planner import Planned

_ROWS = 8
_COLUMNS = 100


class PlanTerminal:
    """Shows a plan; a context manager, since it owns a spinner until the plan is there."""

    def __init__(self, quiet_stdout: bool = False) -> None:
        self.console = Console(stderr=quiet_stdout, highlight=False, soft_wrap=True)
        # A table is shown whole, also where the output is narrower.
        self.console.width = max(self.console.width, _COLUMNS)
        self._status: Status | None = None

    def __enter__(self) -> PlanTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def busy(self, text: str) -> None:
        """What is going on, on a terminal, until the plan is shown."""
        if self._status is None:
            self._status = self.console.status(escape(text))
            self._status.start()
        self._status.update(escape(text))

    def show(self, planned: Planned) -> None:
        """The whole plan."""
        plan = planned.plan
        for line in _head(planned):
            self.console.print(escape(line))
        if plan.best is not None:
            self._fitting(planned, plan.best)
        if any(point.rows for point in plan.frontier):
            self.console.print()
            self.console.print(_frontier_table(plan))
        self.console.print()
        for line in _foot(plan):
            self.console.print(escape(line))

    def _fitting(self, planned: Planned, best: Candidate) -> None:
        plan = planned.plan
        self.console.print(f"best     [bold green]{escape(candidate_words(best))}[/]")
        lossy = lossy_given_up(plan.wish, best, _sequence_cost(planned.prepared.data, best))
        for given in lossy:
            self.console.print(f"         [bold yellow]{escape(one_given_up(given))}[/]")
        if not lossy:
            self.console.print("         nothing is given up that changes the result")
        self.console.print()
        self.console.print(_fitting_table(plan))


def _head(planned: Planned) -> Iterator[str]:
    plan, prepared = planned.plan, planned.prepared
    yield f"device   {plan.device.name}, budget {_budget_words(plan.budget)}"
    model = prepared.model
    yield f"model    {prepared.source.model} ({model.architecture}), {parameter_count(model.num_parameters)} parameters"
    if not planned.assumed_length:
        yield f"data     {prepared.data.num_examples:,} examples, at most {prepared.data.longest:,} tokens"
    for note in planned.notes:
        yield f"note     {note}"
    yield f"wish     {candidate_words(plan.wish)}"


def _budget_words(budget: MemoryBudget) -> str:
    headroom = f", {format_bytes(budget.headroom_bytes)} headroom" if budget.headroom_bytes else ""
    return f"{format_bytes(budget.total_bytes)}{headroom}"


def _sequence_cost(data: DataFacts, chosen: Candidate) -> str:
    examples, share = data.truncation_cost(chosen.max_seq_length)
    return f"{examples:,} of {data.num_examples:,} examples and {share:.1%} of the trained tokens are cut"


def _fitting_table(plan: Plan) -> Table:
    """The best, and what is slower but needs less."""
    table = _table("micro-batch", "layers ckpt.", "offloaded", "optimizer", "bits", "memory", "tokens/s")
    for column in (5, 6):
        table.columns[column].justify = "right"
    for estimated in plan.shortlist(_ROWS):
        c = estimated.candidate
        table.add_row(
            size_words(c),
            str(c.checkpointed_layers) if c.checkpointed_layers else "–",
            c.offload_activations if c.offload_activations != "none" else "–",
            c.optimizer,
            str(c.quantization_bits),
            _memory(estimated),
            f"{estimated.tokens_per_second:,.0f}" if estimated.tokens_per_second else "–",
        )
    return table


def _memory(estimated: Estimated) -> str:
    text = format_bytes(estimated.needed_bytes)
    return f"≤ {text}" if estimated.bracket else text


def _frontier_table(plan: Plan) -> Table:
    """Lengths across, and the largest micro-batch at each; a row for each number of layers checkpointed."""
    lengths = sorted({point.max_seq_length for point in plan.frontier})
    table = _table("largest micro-batch at", *(f"{length:,}" for length in lengths))
    for column in table.columns[1:]:
        column.justify = "right"
    for layers in sorted({point.checkpointed_layers for point in plan.frontier}):
        rows = [str(point.rows or "–") for point in plan.frontier if point.checkpointed_layers == layers]
        table.add_row(f"{layers} layers checkpointed" if layers else "no checkpointing", *rows)
    return table


def _foot(plan: Plan) -> Iterator[str]:
    if plan.cheapest is not None:
        need = format_bytes(plan.cheapest.needed_bytes)
        speed = plan.cheapest.tokens_per_second
        fast = f", {speed:,.0f} tokens/s" if speed else ""
        yield f"cheapest card that runs this as asked: {plan.cheapest_card} ({need}{fast}),"
        yield f"with {candidate_words(plan.cheapest.candidate)}"
    else:
        yield "no card known here runs this as asked"
    if plan.failed:
        yield f"{len(plan.failed)} of the candidates could not be estimated: {plan.failed[0][1]}"
    yield f"{len(plan.estimates)} candidates estimated. Memory is what the driver will show, mostly within 1 %;"
    yield "tokens/s, with padding, follow from the card's data sheet: ± 25 % until it is calibrated."


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table
