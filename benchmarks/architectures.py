"""Every causal language model of transformers, tiny, on the CPU: what `estimate` says beside what `probe` counts.

    python benchmarks/architectures.py --out benchmarks/results/architectures.json

LoRA on all linear layers, float32, 2 × 48 tokens, plain and with every layer checkpointed, some families also in
4 bits; each architecture in a process of its own. Also compares the chunked loss with the full one. What cannot be
built or trained on a CPU is skipped by name with the reason. Exit code 5 where an estimate is wrong and not marked,
or a loss differs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from loss_check import loss_difference
from tiny_architectures import ARCHITECTURES, tiny_config

from autofit.cases import Case, make_case
from autofit.memory.device import cpu_facts
from autofit.memory.estimate import estimate
from autofit.space.settle import settle
from autofit.space.source import ModelSource
from autofit.step.inspect import inspect_model
from autofit.training.workspace import environment
from autofit.trial.phases import PhaseReport
from autofit.trial.probe import run_probe

TIMEOUT_SECONDS = 180.0
LOSS_TOLERANCE = 1e-4
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": {"checkpointed_layers": "all"},
    "4 bits": {"quantization_bits": 4},
}
IN_FOUR_BITS = (
    *("bloom", "cohere", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "jamba", "llama"),
    *("mamba2", "mistral", "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "qwen3_next"),
    *("stablelm", "starcoder2"),
)


def probed(case: Case) -> dict[str, Any]:
    """What the step holds in this process, counted; with `candidate`, `notes` and `lora_targets_used`."""
    request = {
        "asked": case.asked,
        "model": case.model,
        "trust_remote_code": False,
        "device": "cpu",
        "gpu_mem": None,
        "seed": 0,
    }
    report = PhaseReport()
    return {**run_probe(request, report), **report.record}


def estimated(case: Case) -> dict[str, Any]:
    """The estimate of a case for the CPU."""
    source = ModelSource(model=case.model, random_weights=True)
    candidate, _ = settle(case.asked, inspect_model(source), cpu_facts(), "float32")
    return estimate(candidate, source, cpu_facts()).to_json()


def verdict(measured: int, estimate: dict[str, Any]) -> str:
    """exact, bracket (marked, and it holds), 1 % or wrong."""
    guess, bracket = estimate.get("peak_allocated_bytes"), estimate.get("bracket")
    if guess == measured:
        return "exact"
    if bracket is not None and bracket[0] <= measured <= bracket[1]:
        return "bracket"
    return "1 %" if guess is not None and abs(guess - measured) <= 0.01 * measured else "wrong"


def compare(model_type: str) -> dict[str, Any]:
    """The row of one architecture, in this process."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    row: dict[str, Any] = {"architecture": model_type, "modes": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            tiny_config(model_type).save_pretrained(folder / "model")
            for mode in _modes(model_type):
                found = _mode(folder / "model", MODES[mode])
                row["lora_targets_used"] = found.pop("lora_targets_used")
                row["modes"][mode] = found
            row["loss_difference"] = loss_difference(tiny_config(model_type), folder / "sharp")
        except Exception as error:
            row["skipped"] = _in_one_line(error).replace(f"{folder}/", "")
    return row


def _modes(model_type: str) -> tuple[str, ...]:
    return tuple(MODES) if model_type in IN_FOUR_BITS else ("plain", "checkpointed")


def _mode(folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    common = {"model": str(folder), "device": "cpu", "max_seq_length": 48, "micro_batch_size": 2}
    case = make_case({**common, "dtype": "float32", "quantization_bits": 16, **fields})
    found = probed(case)
    try:
        answer = estimated(case)
    except Exception as error:
        # What was measured could be estimated: this is no reason to skip it.
        answer = {"error": _in_one_line(error)}
    measured = found["peak_allocated_bytes"]
    return {
        "measured_bytes": measured,
        "estimated_bytes": answer.get("peak_allocated_bytes"),
        "bracket": answer.get("bracket"),
        "guesses": answer.get("guesses"),
        "estimate_error": answer.get("error"),
        "verdict": verdict(measured, answer),
        "checkpointed_layers": found["candidate"]["checkpointed_layers"],
        "loss": found["candidate"]["loss"],
        "lora_targets_used": found["lora_targets_used"],
    }


def _in_one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A strict config's validators say in a first line which of them it was, and then what is wrong.
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return f"{type(error).__name__}: {text}"[:300]


def in_child(model_type: str) -> dict[str, Any]:
    """`compare` in a fork of this process: a crash, a leak or a patch stays there."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    begun = time.monotonic()
    child = context.Process(target=_send, args=(sender, model_type), daemon=True)
    child.start()
    sender.close()
    row: dict[str, Any] = {"architecture": model_type, "modes": {}}
    try:
        if receiver.poll(TIMEOUT_SECONDS):
            row = receiver.recv()
        else:
            row["skipped"] = f"no end after {TIMEOUT_SECONDS:.0f} s"
            child.kill()
        child.join()
    except EOFError:
        child.join()
        row["skipped"] = f"its process ended with {child.exitcode}"
    return {**row, "seconds": round(time.monotonic() - begun, 1)}


def _send(sender: Any, model_type: str) -> None:
    sender.send(compare(model_type))


def as_line(row: dict[str, Any]) -> str:
    """One line of the table."""
    name = f"{row['architecture']:<26}"
    if "skipped" in row:
        return f"{name} skipped: {row['skipped']}"
    cells = [f"{mode} {found['measured_bytes']:>10,} {found['verdict']:<8}" for mode, found in row["modes"].items()]
    difference = row["loss_difference"]
    loss = "full loss" if difference is None else f"loss {difference:.0e}"
    return "  ".join([name, *cells, loss])


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many were skipped, the verdicts by mode, and who is wrong."""
    ran = [row for row in rows if "skipped" not in row]
    verdicts = {
        mode: dict(Counter(row["modes"][mode]["verdict"] for row in ran if mode in row["modes"])) for mode in MODES
    }
    wrong = [r["architecture"] for r in ran if any(found["verdict"] == "wrong" for found in r["modes"].values())]
    losses = [r["architecture"] for r in ran if (r["loss_difference"] or 0) > LOSS_TOLERANCE]
    skipped = [row["architecture"] for row in rows if "skipped" in row]
    return {"ran": len(ran), "skipped": skipped, "verdicts": verdicts, "wrong": wrong, "losses_that_differ": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES, help="transformers' model types; all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    begun = time.monotonic()
    rows = []
    with ThreadPoolExecutor(asked.workers) as pool:
        for row in pool.map(in_child, asked.architectures):
            rows.append(row)
            print(as_line(row), flush=True)
    document = {"summary": summary(rows), "environment": environment(), "rows": rows}
    document["seconds"] = round(time.monotonic() - begun, 1)
    print(json.dumps(document["summary"], indent=1), f"{document['seconds']} s", sep="\n")
    if asked.out is not None:
        asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    sys.exit(5 if document["summary"]["wrong"] or document["summary"]["losses_that_differ"] else 0)


if __name__ == "__main__":
    main()
