"""A few long sequences among many short ones: run alone, recomputed and offloaded, or setting the pace of all.

    python benchmarks/long_rows_8b.py --cap 24GB --out benchmarks/results/long_rows_8b-h100.json

`autofit run` of Llama-3.1-8B in 4 bits, random weights, global batch 64, log-normal lengths (median 300, at most 2,048
tokens) and one sequence in 128 of 16,384 tokens. Once as it comes; once with `tokens_per_micro_batch` at the longest,
so that nothing runs alone. Seconds are those of whole optimizer steps after the first.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from packed_8b import GLOBAL_BATCH, STEPS, WARM, lengths

LONG, EVERY = 16384, 128


def run(cap: str, folder: Path, config: str) -> dict[str, Any]:
    """A run of the command, as a user's; what is kept of it."""
    draw = random.Random(1)
    folder.mkdir()
    with (folder / "data.jsonl").open("w") as file:
        for number, length in enumerate(lengths()):  # a byte is a token, and the end is one
            length = LONG if number % EVERY == EVERY // 2 else length
            file.write(json.dumps({"text": "".join(draw.choices("abcdefghij ", k=length - 1))}) + "\n")
    (folder / "run.yaml").write_text(f"global_batch_size: {GLOBAL_BATCH}\neval_fraction: 0.0\n{config}")
    command = [sys.executable, "-m", "autofit", "run", str(folder / "run.yaml"), "--model", "llama-3.1-8b"]
    command += ["--random-weights", "--data", str(folder / "data.jsonl"), "--gpu-mem", cap]
    command += ["--max-steps", str(STEPS), "--output-dir", str(folder / "run")]
    code = subprocess.run(command, check=False).returncode
    if code:
        return {"exit_code": code}
    plan = json.loads((folder / "run/plan.json").read_text())
    steps = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in steps if "tokens" in line]
    events = [json.loads(line) for line in (folder / "run/events.jsonl").read_text().splitlines()]
    return {
        "real_tokens_per_second": sum(line["tokens"] for line in steps[WARM:])
        / (steps[-1]["seconds"] - steps[WARM - 1]["seconds"]),
        "chosen": plan["chosen"],
        "predicted_bytes": plan["predicted_bytes"],
        "trial": plan["measured"],
        "training": {k: v for k, v in events[-1].items() if k.startswith("peak") or k == "device_bytes"},
        "ooms": sum(event["event"] == "oom" for event in events),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cap", default="24GB")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        alone = run(asked.cap, Path(scratch) / "alone", "")
        print("alone:", alone, flush=True)
        pace = run(asked.cap, Path(scratch) / "pace", f"tokens_per_micro_batch: {LONG}\n")
        print("all alike:", pace, flush=True)
    from autofit.memory.device import detect_device
    from autofit.training.workspace import environment

    document = {"cap": asked.cap, "alone": alone, "all_alike": pace, "long": LONG, "one_in": EVERY}
    document |= {"device": detect_device().to_json(), "environment": environment()}
    asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
