"""How far `autofit estimate` is from what was measured: a table, the medians, the worst cases.

    python benchmarks/estimate_accuracy.py benchmarks/data/ground_truth_llama_3_8b.jsonl \\
        --json benchmarks/results/estimate_accuracy-h200.json

Reads rows as in benchmarks/data, or what `autofit probe --cases` wrote. Exit code 5 where a median or a worst case of
allocated or reserved bytes is past its bound. With --json it also estimates an 8B and a 70B for the time that they
take; that a machine is slow is no reason to fail.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measured_rows import MeasuredRow, read_rows

from autofit.cases import Case, make_case
from autofit.cli.estimate import Estimator
from autofit.errors import AutofitError, UsageError
from autofit.memory.settled import DEFAULT_CARD, known_card
from autofit.report.words import candidate_words
from autofit.space.candidate import Candidate
from autofit.training.workspace import environment

PAST_THE_BOUNDS = 5
# Percent of what was measured: (median, worst).
BOUNDS = {"allocated": (0.3, 1.0), "reserved": (2.0, 5.0)}
SECONDS_BOUNDS = {"llama-3-8b": 0.5, "llama-3-70b": 1.0}
RSS_BOUND_BYTES = 1_200_000_000
TIMED_SHAPE = {"max_seq_length": 2048, "micro_batch_size": 2}
TIMED = (
    {"checkpointed_layers": "none"},
    {"checkpointed_layers": "all"},
    {"checkpointed_layers": "all", "loss": "full"},
)


def compare(row: MeasuredRow, estimator: Estimator) -> dict[str, Any]:
    """What was measured of a row, what is estimated, and the errors in percent; `failed` says why there is none.

    Raises:
        UsageError: a row that makes no candidate of this model.
    """
    settled = estimator.settle(row.case)
    line = {
        "line": row.line,
        "model": Path(row.case.model).name,
        "step": settled.candidate.step,
        "candidate": _words(settled.candidate),
    }
    try:
        found = estimator.estimate(row.case)[1]
    except UsageError:
        raise
    except AutofitError as error:
        return {**line, "failed": str(error)}
    speeds = row.tokens_per_second, found.tokens_per_second
    return {
        **line,
        "allocated": _beside(row.allocated, found.peak_allocated_bytes),
        "reserved": None if row.reserved is None else _beside(row.reserved, found.peak_reserved_bytes),
        "tokens_per_second": None if None in speeds else _beside(*map(float, speeds)),
        "bracket": found.bracket,
        "seconds": round(found.seconds, 3),
    }


def _beside(measured: float, estimated: float) -> dict[str, float]:
    error = 100 * (estimated - measured) / measured
    return {"measured": measured, "estimated": round(estimated, 1), "error_percent": round(error, 3)}


def _words(candidate: Candidate) -> str:
    """The candidate and what the words that people are given leave out."""
    words = [candidate_words(candidate)]
    if candidate.lora_targets != ("all-linear",):
        words.append("on " + " ".join(candidate.lora_targets))
    if candidate.lora_dropout:
        words.append(f"dropout {candidate.lora_dropout}")
    if candidate.prepare_kbit:
        words.append("prepared by PEFT")
    if candidate.quantization_bits == 4 and not candidate.double_quant:
        words.append("quantized once")
    return ", ".join(words)


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median and worst |error| in percent of each quantity beside its bound, and whether all are within."""
    failed = [line["line"] for line in lines if "failed" in line]
    found: dict[str, Any] = {"rows": len(lines), "failed_lines": failed, "within_bounds": not failed}
    for name, (median_bound, worst_bound) in BOUNDS.items():
        errors = _errors(lines, name)
        if not errors:
            continue
        worst = max(errors)
        found[name] = {
            "median_percent": round(statistics.median(errors), 3),
            "median_bound_percent": median_bound,
            "worst_percent": worst,
            "worst_bound_percent": worst_bound,
            "worst_line": next(x["line"] for x in lines if x.get(name) and abs(x[name]["error_percent"]) == worst),
        }
        found["within_bounds"] &= statistics.median(errors) <= median_bound and worst <= worst_bound
    speeds = _errors(lines, "tokens_per_second")
    if speeds:
        found["tokens_per_second"] = {
            "rows": len(speeds),
            "median_percent": round(statistics.median(speeds), 1),
            "worst_percent": round(max(speeds), 1),
        }
    return found


def _errors(lines: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [abs(line[name]["error_percent"]) for line in lines if line.get(name) is not None]


def print_table(lines: Sequence[dict[str, Any]], found: dict[str, Any]) -> None:
    """One line a row, in GiB, then the summary."""
    print(f"line  {'allocated':>9} {'estimated':>9} {'error':>8}   {'reserved':>9} {'estimated':>9} {'error':>8}")
    for line in lines:
        cells = f"FAILED: {line['failed']}" if "failed" in line else "   ".join(_cells(line[name]) for name in BOUNDS)
        print(f"{line['line']:>4}  {cells}  {line['model']} {line['step']}: {line['candidate']}")
    for name in BOUNDS:
        if name in found:
            print(
                "{0:<9} median {median_percent:.3f} % (bound {median_bound_percent} %), worst {worst_percent:.3f} % "
                "(bound {worst_bound_percent} %) in line {worst_line}".format(name, **found[name])
            )
    if "tokens_per_second" in found:
        print(
            "tokens/s  median {median_percent} %, worst {worst_percent} %, {rows} rows".format(
                **found["tokens_per_second"]
            )
        )
    print("within the bounds" if found["within_bounds"] else "PAST THE BOUNDS")


def _cells(pair: dict[str, float] | None) -> str:
    if pair is None:
        return f"{'-':>9} {'-':>9} {'-':>8}"
    gib = 2**30
    return f"{pair['measured'] / gib:>9.3f} {pair['estimated'] / gib:>9.3f} {pair['error_percent']:>+7.3f}%"


def cost(estimator: Estimator, card: str) -> dict[str, Any]:
    """Seconds of an estimate once its model's code is imported, and the most memory that this process ever took.

    The seconds of the CPU say what a machine that others use at the same time would have needed alone.
    """
    found: dict[str, Any] = {}
    for model, bound in SECONDS_BOUNDS.items():
        cases = [make_case({"model": model, "card": card, **TIMED_SHAPE, **fields}) for fields in TIMED]
        estimator.estimate(cases[0])
        times = [_timed(estimator, case) for case in cases]
        found[model] = {
            "median_seconds": round(statistics.median(wall for wall, _ in times), 3),
            "median_cpu_seconds": round(statistics.median(cpu for _, cpu in times), 3),
            "bound_seconds": bound,
        }
    found["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["peak_rss_bound_bytes"] = RSS_BOUND_BYTES
    return found


def _timed(estimator: Estimator, case: Case) -> tuple[float, float]:
    begun = time.process_time()
    _, found = estimator.estimate(case)
    return found.seconds, time.process_time() - begun


def machine() -> dict[str, Any]:
    """What the estimates ran on."""
    return {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine(), **environment()}


def run(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--card", default=DEFAULT_CARD, help="what the rows were measured on; default: %(default)s")
    parser.add_argument("--json", type=Path, help="where the table goes, with the machine and the versions")
    asked = parser.parse_args(arguments)
    known_card(asked.card)
    estimator = Estimator()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch:
        warnings.simplefilter("ignore")
        rows = read_rows(asked.rows, asked.card, Path(scratch), lambda model: _layers(estimator, model))
        lines = [compare(row, estimator) for row in rows]
        found = summary(lines)
        print_table(lines, found)
        if asked.json is not None:
            document = {"card": asked.card, "summary": found, "cost": cost(estimator, asked.card), "machine": machine()}
            print(json.dumps(document["cost"]))
            _write(asked.json, {**document, "rows": lines})
    return 0 if found["within_bounds"] else PAST_THE_BOUNDS


def _layers(estimator: Estimator, model: str) -> int:
    return estimator.settle(make_case({"model": model, "card": DEFAULT_CARD})).model.checkpointable_layers


def _write(file: Path, document: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"json {file}: {error.strerror or error}") from error


def main() -> None:
    try:
        sys.exit(run(sys.argv[1:]))
    except AutofitError as error:
        print(f"estimate_accuracy: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
