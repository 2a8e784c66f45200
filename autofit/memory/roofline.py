"""How long a step takes: each operation as long as its products or its bytes need, and never faster than the host.

The three constants are fitted to the timed rows of Llama-3-8B on an H200 (stock TRL); calibration corrects each card.
"""

from __future__ import annotations

from collections.abc import Sequence

from autofit.memory.trace import AFTER, OPTIMIZER, Trace
from autofit.space.cards import Card

# Shares of the data sheet's figures that are reached.
PRODUCT_EFFICIENCY = 0.62
BANDWIDTH_EFFICIENCY = 0.66
# What Python, autograd and PEFT need to launch one operation.
HOST_SECONDS_PER_OPERATION = 45e-6


def step_seconds(trace: Trace, card: Card) -> float:
    """Seconds of forward and backward of the trace's last optimizer step."""
    flops, moved = _last_step(trace)
    products = card.dense_tflops * 1e12 * PRODUCT_EFFICIENCY
    bandwidth = card.bandwidth_bytes_per_second * BANDWIDTH_EFFICIENCY
    device = sum(max(f / products, m / bandwidth) for f, m in zip(flops, moved, strict=True))
    host = HOST_SECONDS_PER_OPERATION * sum(m > 0 for m in moved)
    return max(device, host)


def _last_step(trace: Trace) -> tuple[Sequence[float], Sequence[float]]:
    """FLOPs and bytes of the operations between the last optimizer step but one and the last."""
    sections = [(operation, section) for _, operation, section in trace.sections]
    last = max(section.step for _, section in sections)
    begins = [operation for operation, section in sections if section.kind in (AFTER, OPTIMIZER)]
    earlier = [operation for operation, section in sections if section.kind == AFTER and section.step < last]
    end = next(operation for operation, section in sections if section.kind == OPTIMIZER and section.step == last)
    begin = max((o for o in earlier if o <= end), default=begins[0] if begins and begins[0] < end else 0)
    return trace.flops[begin:end], trace.moved[begin:end]
