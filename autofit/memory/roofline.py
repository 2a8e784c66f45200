"""How long a step takes: each operation as long as its products or its bytes need, and never faster than the host.

The three constants are fitted to the timed rows of Llama-3-8B on an H200 (stock TRL); calibration corrects each card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autofit.memory.trace import AFTER, OPTIMIZER, Trace
from autofit.space.cards import Card

# Shares of the data sheet's figures that are reached.
PRODUCT_EFFICIENCY = 0.62
BANDWIDTH_EFFICIENCY = 0.66
# What Python, autograd and PEFT need to launch one operation.
HOST_SECONDS_PER_OPERATION = 45e-6


@dataclass(frozen=True)
class Operations:
    """Operations in a row: FLOPs of their products, bytes they move, and whether they grow with the rows."""

    flops: Sequence[float]
    moved: Sequence[float]
    grows: Sequence[bool]

    def that_grow(self, wanted: bool) -> Operations:
        """Those that grow with the rows, or the others."""
        kept = [i for i, grows in enumerate(self.grows) if grows is wanted]
        return Operations([self.flops[i] for i in kept], [self.moved[i] for i in kept], [wanted] * len(kept))


def step_seconds(trace: Trace, card: Card) -> float:
    """Seconds of forward and backward of the trace's last optimizer step."""
    operations = last_step(trace)
    return max(device_seconds(operations, card), host_seconds(operations))


def device_seconds(operations: Operations, card: Card) -> float:
    """Seconds that the card needs for these operations, one after the other."""
    products = card.dense_tflops * 1e12 * PRODUCT_EFFICIENCY
    bandwidth = card.bandwidth_bytes_per_second * BANDWIDTH_EFFICIENCY
    pairs = zip(operations.flops, operations.moved, strict=True)
    return sum(max(flops / products, moved / bandwidth) for flops, moved in pairs)


def host_seconds(operations: Operations) -> float:
    """Seconds that the host needs to launch them."""
    return HOST_SECONDS_PER_OPERATION * sum(moved > 0 for moved in operations.moved)


def last_step(trace: Trace) -> Operations:
    """Forward and backward between the last optimizer step but one and the last."""
    sections = [(operation, section) for _, operation, section in trace.sections]
    last = max(section.step for _, section in sections)
    end = next(operation for operation, section in sections if section.kind == OPTIMIZER and section.step == last)
    begins = [operation for operation, section in sections if section.kind == AFTER and operation <= end]
    begin = max(begins, default=0)
    return Operations(trace.flops[begin:end], trace.moved[begin:end], trace.grows[begin:end])
