"""How long a step takes: each operation as long as its products or its bytes need, and never faster than the host.

The three constants are fitted to the timed rows of Llama-3-8B on an H200 (stock TRL); calibration corrects each card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autofit.memory.growth import Template
from autofit.memory.trace import AFTER, OPTIMIZER, Trace
from autofit.space.cards import Card

# Shares of the data sheet's figures that are reached.
PRODUCT_EFFICIENCY = 0.62
BANDWIDTH_EFFICIENCY = 0.66
# What Python, autograd and PEFT need to launch one operation.
HOST_SECONDS_PER_OPERATION = 45e-6


@dataclass(frozen=True)
class Operations:
    """Operations in a row: FLOPs of their products, bytes they move, and how they grow (`Trace.grows`)."""

    flops: Sequence[float]
    moved: Sequence[float]
    grows: Sequence[int]


def step_seconds(trace: Trace, card: Card) -> float:
    """Seconds of forward and backward of the trace's last optimizer step."""
    operations = last_step(trace)
    return max(device_seconds(operations, card), host_seconds(operations))


def device_seconds(operations: Operations, card: Card) -> float:
    """Seconds that the card needs for these operations, one after the other."""
    products, bandwidth = _reached(card)
    pairs = zip(operations.flops, operations.moved, strict=True)
    return sum(max(flops / products, moved / bandwidth) for flops, moved in pairs)


def _reached(card: Card) -> tuple[float, float]:
    """(floating-point operations, bytes) that are reached in a second."""
    return card.dense_tflops * 1e12 * PRODUCT_EFFICIENCY, card.bandwidth_bytes_per_second * BANDWIDTH_EFFICIENCY


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


@dataclass(frozen=True)
class Growing:
    """The time of a step whose trace stands for other rows and lengths.

    Attributes:
        products, copies: seconds that each operation's products and bytes take, traced.
        grows: see `Trace`.
        by_square: whether an operation's products grow with the square of the length: scores.
        host: seconds.
    """

    template: Template
    products: np.ndarray
    copies: np.ndarray
    grows: np.ndarray
    by_square: np.ndarray
    host: float

    @classmethod
    def of(cls, trace: Trace, template: Template, card: Card) -> Growing:
        """That of the trace's last step on a card."""
        operations = last_step(trace)
        products, bandwidth = _reached(card)
        return cls(
            template=template,
            products=np.array(operations.flops) / products,
            copies=np.array(operations.moved) / bandwidth,
            grows=np.array(operations.grows),
            by_square=np.array([template.length_power(flops) == 2 for flops in operations.flops]),
            host=host_seconds(operations),
        )

    def step_seconds(self, rows: int, length: int) -> float:
        """Seconds of forward and backward for so many rows of so many tokens."""
        longer = length / self.template.length
        share = np.where(self.grows > 0, longer * rows / self.template.rows, 1.0)
        products = self.products * share * np.where(self.by_square, longer, 1.0)
        copies = self.copies * share * np.where(self.grows > 1, longer, 1.0)
        return max(float(np.maximum(products, copies).sum()), self.host)
