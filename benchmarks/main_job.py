"""The main job at full size: Llama-3-8B's architecture with random weights, found and trained under a budget.

    python benchmarks/main_job.py --gpu-mem 24GB --out benchmarks/results/main_job.json

Runs `autofit run` as a user would, on sequences of up to 2,048 byte tokens made from the standard library's own
source, and keeps its output, its plan, its trials and its losses beside the machine and the versions.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

MODEL = Path(__file__).parent / "models" / "llama-3-8b"
MAX_TOKENS = 2048


def write_data(file: Path, examples: int, full_length: bool) -> None:
    """Texts of log-normal length (median 300 bytes), some of 2,047 (and the end token); or all that long."""
    sources = sorted(p for p in Path(sysconfig.get_path("stdlib")).glob("*.py") if p.stat().st_size > 4 * MAX_TOKENS)
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        for i in range(examples):
            text = draw.choice(sources).read_text(encoding="utf-8", errors="ignore").encode("ascii", "ignore").decode()
            length = MAX_TOKENS - 1 if full_length or i % 32 == 0 else int(draw.lognormvariate(5.7, 0.9)) + 16
            start = draw.randrange(0, len(text) - MAX_TOKENS)
            out.write(json.dumps({"text": text[start : start + min(length, MAX_TOKENS - 1)]}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu-mem", default="24GB")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--examples", type=int, default=640)
    parser.add_argument("--full-length", action="store_true", help="every sequence has 2,048 tokens")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data, run = Path(scratch) / "data.jsonl", Path(scratch) / "run"
        write_data(data, asked.examples, asked.full_length)
        command = [
            *("autofit", "run", "--model", str(MODEL), "--random-weights", "--data", str(data)),
            *("--gpu-mem", asked.gpu_mem, "--max-steps", str(asked.steps), "--output-dir", str(run)),
        ]
        print("$", " ".join(command), flush=True)
        entry = "from autofit.cli.main import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", entry, *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
        result = {
            "command": _anywhere(" ".join(command), scratch),
            "exit_code": process.wait(),
            "output": [_anywhere(line, scratch) for line in lines],
            "environment": _read(run / "env.json"),
            "plan": _read(run / "plan.json"),
            "events": [json.loads(line) for line in _lines(run / "events.jsonl")],
            "metrics": [json.loads(line) for line in _lines(run / "metrics.jsonl")],
            "adapter_bytes": _size(run / "adapter" / "adapter_model.safetensors"),
        }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(result["exit_code"])


def _anywhere(text: str, scratch: str) -> str:
    """The text without this machine's folders."""
    return text.replace(scratch, "SCRATCH").replace(f"{Path(__file__).resolve().parent.parent}/", "")


def _read(file: Path) -> object:
    return json.loads(file.read_text()) if file.is_file() else None


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


if __name__ == "__main__":
    main()
