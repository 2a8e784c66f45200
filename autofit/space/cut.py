"""The one cut: which sequences of a global batch share a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence


def cut(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices of the sequences in each micro-batch: longest first, rows × longest ≤ `token_budget`.

    A sequence longer than the budget runs alone. Every index appears once; the order within a length is kept.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    start = 0
    while start < len(order):
        rows = max(1, token_budget // max(1, lengths[order[start]]))
        groups.append(order[start : start + rows])
        start += rows
    return groups


def padded_tokens(lengths: Sequence[int], token_budget: int) -> int:
    """Tokens that run, padding included, for these sequences as one global batch."""
    return sum(len(group) * lengths[group[0]] for group in cut(lengths, token_budget))
