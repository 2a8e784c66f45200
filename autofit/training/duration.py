"""How long a training will take, going by the winning trial's speed and the data's lengths."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from autofit.space.candidate import Candidate
from autofit.space.cut import run_tokens

_SAMPLED_BATCHES = 200


def optimizer_steps(num_examples: int, global_batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Steps of a whole run; the last global batch of an epoch may be smaller."""
    per_epoch = math.ceil(num_examples / global_batch_size)
    return max_steps if max_steps is not None else max(1, math.ceil(per_epoch * epochs))


def estimated_seconds(
    lengths: Sequence[int], candidate: Candidate, global_batch_size: int, steps: int, tokens_per_second: float
) -> float:
    """Seconds for so many steps on these lengths (tokens), cut as training cuts them; loading and saving left out."""
    draw = random.Random(0)
    clipped = [min(length, candidate.max_seq_length) for length in lengths]
    rows = min(global_batch_size, len(clipped))
    batches = [draw.sample(clipped, rows) for _ in range(_SAMPLED_BATCHES)]
    mean = sum(run_tokens(batch, candidate.token_budget, candidate.layout) for batch in batches) / len(batches)
    return steps * mean / tokens_per_second


def spoken(seconds: float) -> str:
    """`about 3 h 10 min`, `about 40 s`."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    return f"about {hours} h {rest} min" if hours else f"about {minutes} min"
