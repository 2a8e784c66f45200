"""Trials of chosen candidates of one model, one after another: peaks and tokens/s beside each other.

    python benchmarks/trial_table.py benchmarks/models/llama-3-8b --out FILE.json '{"micro_batch_size": 1}' ...

Each argument is a candidate in JSON (fields as in `autofit.space.candidate`); the rest are defaults: length 2,048,
4 bits, rank 16. Random weights at full size; no budget below the card's own memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from autofit.memory.device import detect_device
from autofit.search.runner import SandboxRunner
from autofit.space.budget import make_budget
from autofit.space.candidate import Candidate
from autofit.space.source import ModelSource
from autofit.training.supervisor import PRELOAD
from autofit.training.workspace import environment
from autofit.trial.sandbox import Sandbox

DEFAULTS = {"micro_batch_size": 1, "max_seq_length": 2048, "quantization_bits": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("candidates", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with Sandbox(preload=PRELOAD) as sandbox, tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        device = detect_device()
        runner = SandboxRunner(
            sandbox=sandbox,
            folder=folder / "trials",
            source=ModelSource(model=asked.model, random_weights=True),
            device=device,
            budget=make_budget("auto", device),
            lora_alpha=32,
            seed=0,
            deadline_seconds=120,
        )
        rows = []
        for text in asked.candidates:
            candidate = Candidate(**{**DEFAULTS, **json.loads(text)})
            result = runner.run(candidate)
            rows.append({**candidate.to_json(), **result.to_json()})
            print(text, result, flush=True)
    document = {"device": device.to_json(), "environment": environment(), "rows": rows}
    asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
