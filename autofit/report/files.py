"""report.html and README.md (the model card) in a run's folder, from the same facts as the terminal."""

from __future__ import annotations

from html import escape

from autofit.report.words import candidate_words, given_up_words, loss_words, mended_words
from autofit.search.outcome import Trial
from autofit.space.units import format_bytes
from autofit.training.supervisor import RunSummary
from autofit.training.workspace import Workspace


def write_reports(summary: RunSummary) -> None:
    """Writes both files, each whole or not at all; the card last, and beside the adapter too."""
    workspace = Workspace(summary.folder)
    workspace.write_text("report.html", html_report(summary))
    card = model_card(summary)
    (summary.folder / "adapter" / "README.md").write_text(card, encoding="utf-8")  # what people upload
    workspace.write_text("README.md", card)


def model_card(summary: RunSummary) -> str:
    """The model card: what was trained, how, and what was given up to fit."""
    report, training = summary.report, summary.training
    chosen = report.winner.candidate
    given = "\n".join(f"- {line}" for line in [*given_up_words(report), *mended_words(training)]) or "- nothing"
    base = "random weights of " if summary.source.random_weights else ""
    return f"""---
library_name: peft
base_model: {summary.source.model}
tags: [lora, autofit]
---
# LoRA adapter

Trained on {base}`{summary.source.model}` with {report.num_examples:,} examples, {training["steps"]:,} optimizer steps;
{loss_words(training)}.

- device: {report.device.name}, budget {format_bytes(report.budget.total_bytes)}
- config: {candidate_words(chosen)}
- measured peak: {format_bytes(training["device_bytes"])} in training, {_bytes(report.winner)} in its trial

Given up to fit:

{given}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({summary.source.model!r})
model = PeftModel.from_pretrained(base, {str(summary.folder / "adapter")!r})
```
"""


def html_report(summary: RunSummary) -> str:
    """One page without scripts: the choice, the trials, the training."""
    report, training = summary.report, summary.training
    rows = "\n".join(_row(trial, trial is report.winner) for trial in report.trials)
    lines = [*given_up_words(report), *mended_words(training)]
    given = "".join(f"<li>{escape(line)}</li>" for line in lines) or "<li>nothing</li>"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>autofit: {escape(summary.folder.name)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }} td, th {{ text-align: left; padding: .3rem .6rem }}
tr {{ border-bottom: 1px solid #ddd }} .chosen {{ background: #eef8ee }} 
.FIT {{ color: #17762b }} .OOM {{ color: #b3261e }}
</style>
<h1>{escape(candidate_words(report.winner.candidate))}</h1>
<p>{escape(report.device.name)}, budget {format_bytes(report.budget.total_bytes)};
trained {training["steps"]:,} steps, {loss_words(training)},
peak {format_bytes(training["device_bytes"])}.</p>
<h2>Given up</h2><ul>{given}</ul>
<h2>Trials</h2>
<table><tr><th>#<th>candidate<th>ended<th>phase<th>predicted<th>peak<th>tokens/s<th>seconds</tr>
{rows}
</table>
</html>
"""


def _row(trial: Trial, chosen: bool) -> str:
    result = trial.result
    speed = f"{result.tokens_per_second:,.0f}" if result.tokens_per_second else ""
    return (
        f'<tr class="{"chosen" if chosen else ""}"><td>{trial.number + 1}<td>{escape(candidate_words(trial.candidate))}'
        f'<td class="{result.status.value}">{result.status.value}<td>{escape(result.phase)}<td>{_bytes(trial)}'
        f"<td>{speed}<td>{result.seconds:.1f}</tr>"
    )


def _bytes(trial: Trial) -> str:
    return _format(trial.result.device_bytes)


def _format(size: int | None) -> str:
    return "" if size is None else format_bytes(size)
