"""The run, told on a terminal. Human text goes to stdout, or to stderr where stdout is for JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status

from autofit.report.words import candidate_words, loss_words, mended_words, one_given_up, tokens_words
from autofit.search.fit_report import FitReport
from autofit.search.outcome import TrialEvent
from autofit.space.units import format_bytes
from autofit.training.supervisor import RunSummary
from autofit.trial.result import TrialResult, TrialStatus

_STYLES = {TrialStatus.FIT: "bold green", TrialStatus.OOM: "bold red"}


class Terminal:
    """The narrator of a run (`training.supervisor.Narrator`). Use as a context manager: it owns a progress bar."""

    def __init__(self, quiet_stdout: bool = False) -> None:
        self.console = Console(stderr=quiet_stdout, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._status: Status | None = None
        self._last_step = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_status()
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _stop_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def say(self, text: str) -> None:
        self.console.print(escape(text))

    def warn(self, text: str) -> None:
        self.console.print(f"[bold yellow]warning[/]  {escape(text)}")

    def trial(self, event: TrialEvent) -> None:
        """One line a trial, once it has ended; until then a spinner, on a terminal."""
        if event.result is None:
            self._status = self.console.status(f"trial {event.number + 1}  {escape(candidate_words(event.candidate))}")
            self._status.start()
            return
        self._stop_status()
        again = " (from an earlier start)" if event.kind == "stored" else ""
        style = _STYLES.get(event.result.status, "bold yellow")
        self.console.print(
            f"trial {event.number + 1}  [{style}]{event.result.status.value:<8}[/] "
            f"{escape(candidate_words(event.candidate))}  {escape(_measured(event.result))}"
            f"{_predicted(event.predicted_bytes)}{again}"
        )

    def plan(self, report: FitReport) -> None:
        """What was chosen, what was given up and what that costs."""
        self.console.print(f"[bold]chosen[/]   {escape(candidate_words(report.winner.candidate))}")
        for given in report.given_up:
            style = "bold yellow" if given.lossy else "default"
            self.console.print(f"         [{style}]{escape(one_given_up(given))}[/]")
        if not report.given_up:
            self.console.print("         nothing was given up")

    def training(self, record: dict[str, Any]) -> None:
        """The training child's phase record, as often as it is read."""
        if record.get("step", self._last_step) == self._last_step:
            return
        self._last_step = record["step"]
        if self.console.is_terminal:
            self._bar(record)
        elif self._last_step in (1, record["max_steps"]) or self._last_step % max(1, record["max_steps"] // 10) == 0:
            self.say(f"step {record['step']}/{record['max_steps']}  {_loss(record)}")

    def finished(self, summary: RunSummary) -> None:
        """The end: losses, the measured peak beside the budget, and where everything is."""
        self.__exit__()
        training, report = summary.training, summary.report
        worst = report.winner.result.device_bytes
        self.console.print(
            f"[bold green]trained[/]  {training['steps']:,} steps, {loss_words(training)}, "
            f"peak {format_bytes(training['device_bytes'])} (worst case {format_bytes(worst or 0)}) "
            f"of {format_bytes(report.budget.total_bytes)}"
        )
        self.console.print(f"         {tokens_words(training)}")
        if training.get("recovered"):
            times = f"{training['recovered']} time{'s' if training['recovered'] > 1 else ''}"
            self.console.print(f"         out of memory {times}, without a trace in the result: see events.jsonl")
        for line in mended_words(training):
            self.console.print(f"         {escape(line)}")
        self.console.print(f"adapter  {escape(str(summary.folder / 'adapter'))}")

    def _bar(self, record: dict[str, Any]) -> None:
        if self._progress is None:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, TextColumn("{task.fields[loss]}"), console=self.console)
            self._progress.add_task("training", total=record["max_steps"], loss="")
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=record["step"], loss=_loss(record))


def _loss(record: dict[str, Any]) -> str:
    return f"loss {record['loss']:.3f}" if "loss" in record else ""


def _predicted(predicted_bytes: int | None) -> str:
    return f" (predicted {format_bytes(predicted_bytes)})" if predicted_bytes is not None else ""


def _measured(result: TrialResult) -> str:
    if result.status is TrialStatus.FIT and result.device_bytes is not None:
        speed = f", {result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else ""
        return f"worst case {format_bytes(result.device_bytes)}{speed}"
    if result.status is TrialStatus.OOM:
        asked = f", asking for {format_bytes(result.requested_bytes)} more" if result.requested_bytes else ""
        needs = f" (would need about {format_bytes(result.projected_bytes)})" if result.projected_bytes else ""
        return f"out of memory in {result.phase}{asked}{needs}"
    return f"in {result.phase}: {result.message}"
