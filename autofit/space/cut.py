"""The one cut: which sequences of a global batch share a micro-batch, padded or packed."""

from __future__ import annotations

from collections.abc import Sequence

# A micro-batch costs about as much besides its tokens as this many tokens would: kernel launches, and the weights
# read (and dequantized) once more. On an H100 with an 8B model in 4 bits, 2,048 tokens took 0.25 to 0.43 s where its
# rate when busy (10,400 tokens/s) would give 0.20: 500 to 2,400 tokens.
OVERHEAD_TOKENS = 1024

# Attention's backward pass takes as much for a moment for each sequence of a packed row as for 128 tokens more. So that
# a row's tokens alone decide how much it needs, they come in blocks of so many, and no more sequences than blocks share
# it.
BLOCK_TOKENS = 64


def cut(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices of the sequences in each micro-batch: longest first, rows × longest ≤ `token_budget`.

    Of all such cuts the cheapest one, counting padded tokens and `OVERHEAD_TOKENS` for each micro-batch. A sequence
    longer than the budget runs alone. Every index appears once; the order within a length is kept.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = len(order)
    # cheapest[i]: cost of the sequences from place i on; ends[i]: where the micro-batch that begins there ends.
    cheapest, ends = [0] * (count + 1), [0] * count
    for begin in reversed(range(count)):
        longest = max(1, lengths[order[begin]])
        most = min(count, begin + max(1, token_budget // longest))
        cheapest[begin], ends[begin] = min(
            ((end - begin) * longest + OVERHEAD_TOKENS + cheapest[end], end) for end in range(begin + 1, most + 1)
        )
    groups: list[list[int]] = []
    begin = 0
    while begin < count:
        groups.append(order[begin : ends[begin]])
        begin = ends[begin]
    return groups


def padded_tokens(lengths: Sequence[int], token_budget: int) -> int:
    """Tokens that run, padding included, for these sequences as one global batch."""
    return sum(len(group) * lengths[group[0]] for group in cut(lengths, token_budget))


def pack(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices of the sequences in each packed row: as few rows of at most `token_budget` tokens as can be, about equal.

    At most `most_sequences` share a row. A sequence longer than the budget has a row to itself. Every index appears
    once; the longest come first.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    alone = [[i] for i in order if lengths[i] > token_budget]
    rest = order[len(alone) :]
    most = most_sequences(token_budget)
    tokens = sum(lengths[i] for i in rest)
    rows = max(-(-tokens // token_budget), -(-len(rest) // most))
    while rest:
        for fullest in (False, True):  # equal rows are better, but cannot always hold all
            packed = _placed(lengths, rest, rows, token_budget, most, fullest=fullest)
            if packed is not None:
                return alone + packed
        rows += 1
    return alone


def most_sequences(token_budget: int) -> int:
    """How many sequences may share a packed row of so many tokens: one less than blocks, so that bounds are as many."""
    return max(1, token_budget // BLOCK_TOKENS - 1)


def whole_blocks(tokens: int) -> int:
    """The tokens of the packed row that has room for these."""
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def _placed(
    lengths: Sequence[int], order: list[int], rows: int, budget: int, most: int, *, fullest: bool
) -> list[list[int]] | None:
    """So many rows: each sequence, longest first, to the emptiest or the `fullest` with room; None where none has."""
    packed: list[list[int]] = [[] for _ in range(rows)]
    filled = [0] * rows
    for i in order:
        room = [r for r in range(rows) if filled[r] + lengths[i] <= budget and len(packed[r]) < most]
        if not room:
            return None
        row = (max if fullest else min)(room, key=filled.__getitem__)
        packed[row].append(i)
        filled[row] += lengths[i]
    return packed


def run_tokens(lengths: Sequence[int], token_budget: int, layout: str) -> int:
    """Tokens that run for these sequences as one global batch in a candidate's `layout`, padding included."""
    return sum(lengths) if layout == "packed" else padded_tokens(lengths, token_budget)
