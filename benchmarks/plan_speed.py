"""How long plans of Llama-3-8B take once everything is imported, and what memory.

    python benchmarks/plan_speed.py --json benchmarks/results/plan_speed.json

Times 512 candidates (rows × length, with no and with all layers checkpointed) and the whole job of `autofit plan`, with
its frontier and its cheapest card, on a card on which much fits and on one on which little does. Each runs in a process
of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autofit.memory.derive import estimate_many, side_by_side
from autofit.memory.planning import run_plan
from autofit.space.budget import make_budget
from autofit.space.candidate import Candidate
from autofit.space.cards import CARDS
from autofit.space.ladder import Limits
from autofit.space.plan_request import PlanRequest
from autofit.space.source import ModelSource
from autofit.space.target import facts_of
from autofit.training.workspace import environment
from autofit.trial.preload import HEAVY_STACK, preload

SOURCE = ModelSource(model="llama-3-8b", random_weights=True)
LAYERS = 32
WISH = Candidate(micro_batch_size=16, max_seq_length=2048, quantization_bits=4, accumulates=True)


def many() -> int:
    """Estimates 512 candidates; returns how many could be."""
    candidates = [
        WISH.replace(tokens_per_micro_batch=None, checkpointed_layers=layers).replace(
            micro_batch_size=rows, max_seq_length=length
        )
        for layers in (0, LAYERS)
        for rows in range(1, 17)
        for length in range(512, 8193, 512)
    ]
    with side_by_side() as pool:
        answers = estimate_many(candidates, SOURCE, facts_of(CARDS["rtx-4090"]), pool=pool)
    return sum(not isinstance(answer, Exception) for answer in answers)


def plan(card: str) -> int:
    """The job of `autofit plan` for a card; returns how many candidates it estimated."""
    device = facts_of(CARDS[card])
    limits = Limits(global_batch_size=16, checkpointable_layers=LAYERS, can_page=True)
    request = PlanRequest(
        source=SOURCE,
        device=device,
        wish=WISH,
        limits=limits,
        usable_bytes=make_budget(card, device).usable_bytes,
        longest=8192,
    )
    answer = run_plan(request.to_json(), lambda *_: None)
    return len(answer["estimates"]) + len(answer["frontier"])


def timed(work: Callable[..., int], *args: Any) -> dict[str, Any]:
    """Candidates, seconds and the most memory of a process and its children, in a process of its own."""

    def measure(out: Any) -> None:
        warnings.simplefilter("ignore")
        begun = time.perf_counter()
        count = work(*args)
        peaks = [resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        seconds = round(time.perf_counter() - begun, 2)
        out.put({"candidates": count, "seconds": seconds, "peak_rss_bytes": max(peaks)})

    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=measure, args=(answers,))
    process.start()
    found: dict[str, Any] = answers.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the figures go, with the machine and the versions")
    asked = parser.parse_args()
    preload(HEAVY_STACK)
    gc.freeze()
    found = {
        "rows × length": timed(many),
        "plan, rtx-4090": timed(plan, "rtx-4090"),
        "plan, rtx-4060": timed(plan, "rtx-4060"),
    }
    for name, figures in found.items():
        print(
            f"{name:<16} {figures['candidates']:>4} candidates  {figures['seconds']:>6.2f} s  "
            f"{figures['peak_rss_bytes'] / 1e9:.2f} GB"
        )
    if asked.json is not None:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"figures": found, "machine": {"cpus": os.cpu_count(), **environment()}}
        asked.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
