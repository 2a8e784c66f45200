"""How an allocation grows with a micro-batch's rows and length, read off its bytes at prime numbers of them.

Every tensor's bytes are a product of sizes. Where the rows are a prime that divides nothing else, what it divides grows
with the rows; where the length is 256 times another such prime, likewise. (256, for what kernels round their sizes up
to.)
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autofit.space.cut import BLOCK_TOKENS

_PRIMES = (23, 29, 31, 37, 41, 43, 47, 53, 59)
_SMALL_PRIMES = (7, 11, 13, 17, 19)
_LARGE_PRIMES = (1021, 2063, 4099, 8209, 16411, 32771)
# Kernels and recurrent layers round lengths up to divisors of this.
LENGTH_UNIT = 256
# TRL's tiles of logits have at most so many rows of tokens.
_TILE_TOKENS = 4096
# In the order of the columns of growth: what an allocation can be a multiple of.
_ONE, _ROWS, _LENGTH, _TOKENS, _SQUARE, _ROWS_SQUARE, _TILE, _SHIFTED_TILE = range(8)
_COLUMNS = 8

Growth = tuple[float, ...]


def constant(size: float) -> Growth:
    """That of what is as large for any rows and length."""
    return (size, *[0.0] * (_COLUMNS - 1))


def basis(rows: int, length: int) -> np.ndarray:
    """The figures that allocations are multiples of, for so many rows of so many tokens."""
    tiles = (min(rows * length, _TILE_TOKENS), min(rows * (length - 1), _TILE_TOKENS))
    return np.array([1, rows, length, rows * length, length**2, rows * length**2, *tiles], dtype=float)


@dataclass(frozen=True)
class Template:
    """The micro-batch that is traced to stand for others: a prime number of rows.

    Attributes:
        prime: of the length; None where it stands for no other length.
    """

    rows: int
    length: int
    prime: int | None

    def growth(self, size: int) -> Growth:
        """What an allocation of so many bytes is a multiple of."""
        by_rows = size % self.rows == 0
        return self._by_length(size / self.rows if by_rows else float(size), int(by_rows))

    def scratch(self, one: int, two: int) -> Growth:
        """The same of scratch, whose bytes for one and for two rows are known: a constant and so much for each row."""
        fixed, each = self._by_length(2.0 * one - two, 0), self._by_length(float(two - one), 1)
        return tuple(a + b for a, b in zip(fixed, each, strict=True))

    def tile(self, size: int) -> Growth:
        """That of TRL's tile of logits, traced in one piece; all tokens have logits, or all but a row's last."""
        growth = [0.0] * _COLUMNS
        for column, length in ((_TILE, self.length), (_SHIFTED_TILE, self.length - 1)):
            if size % (self.rows * length) == 0:
                growth[column] = size / (self.rows * length)
                break
        return tuple(growth)

    def _by_length(self, size: float, by_rows: int) -> Growth:
        growth = [0.0] * _COLUMNS
        power = self.length_power(size)
        if power:
            growth[(_LENGTH, _SQUARE)[power - 1] + by_rows] = size / self.length**power
            return tuple(growth)
        for near in (1, -1) if self.prime is not None else ():
            # One token more or less: labels that are shifted.
            if size and size % _largest_prime(self.length + near) == 0:
                share = size / (self.length + near)
                growth[_LENGTH + by_rows], growth[_ONE + by_rows] = share, near * share
                return tuple(growth)
        growth[_ONE + by_rows] = size
        return tuple(growth)

    def length_power(self, size: float) -> int:
        """With which power of the length a size grows: 0, 1 or 2."""
        if self.prime is None or not size:
            return 0
        return 2 if size % self.prime**2 == 0 else 1 if size % self.prime == 0 else 0


def _largest_prime(number: int) -> int:
    largest, factor = 1, 2
    while factor * factor <= number:
        while number % factor == 0:
            largest, number = max(largest, factor), number // factor
        factor += 1
    return max(largest, number)


def template_for_length(config: Any, lengths: Sequence[int]) -> Template | None:
    """A template for any number of rows of one length; None for several lengths, or where no prime is left.

    Args:
        config: the model's, as a dict.
    """
    if len(lengths) > 1:
        return None
    sizes = list(_integers(config))
    return next((Template(p, lengths[0], None) for p in _PRIMES if _divides_none(p, sizes)), None)


def template_for_lengths(config: Any, lengths: Sequence[int]) -> Template | None:
    """A template for any number of rows and all lengths that are alike (`alike_lengths`) to these; None: it knows none.

    Args:
        config: the model's, as a dict.
        lengths: ascending.
    """
    sizes, edges = list(_integers(config)), _edges(config)
    primes = [p for p in _PRIMES if _divides_none(p, sizes)]
    if not primes or any(length % LENGTH_UNIT for length in lengths):
        return None
    for prime in (*primes[1:], *(p for p in _SMALL_PRIMES if _divides_none(p, sizes))):
        length = LENGTH_UNIT * prime
        beside = [_largest_prime(length + near) for near in (1, -1)]
        alike = bisect_left(edges, length) == bisect_left(edges, lengths[0])
        if alike and primes[0] not in beside and all(p > 9 and _divides_none(p, sizes) for p in beside):
            return Template(primes[0], length, prime)
    return None


def template_for_packed(config: Any, longest: int) -> Template | None:
    """A template for any number of blocks of a packed row, which are its rows; None where no prime is left.

    Args:
        config: the model's, as a dict.
        longest: tokens of the longest sequence, which has to have room in it.
    """
    sizes = list(_integers(config))
    primes = (p for p in _LARGE_PRIMES if p * BLOCK_TOKENS >= longest and _divides_none(p, sizes))
    return next((Template(p, BLOCK_TOKENS, None) for p in primes), None)


def alike_lengths(config: Any, lengths: Sequence[int]) -> list[list[int]]:
    """The lengths, each once, in groups that can share a template: a model may do other things beyond its window."""
    edges = _edges(config)
    groups: dict[Any, list[int]] = {}
    for length in sorted(set(lengths)):
        alone = length % LENGTH_UNIT != 0
        groups.setdefault(length if alone else ("edge", bisect_left(edges, length)), []).append(length)
    return list(groups.values())


def _edges(config: Any) -> list[int]:
    """Lengths at which a model may begin to do something else, ascending."""
    found: set[int] = set()
    waiting = [config]
    while waiting:
        for name, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            elif type(value) is int and any(part in name for part in ("window", "position", "chunk")):
                found.add(value)
    return sorted(found)


def _integers(tree: Any) -> Iterator[int]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _integers(item)
    elif type(tree) is int and tree > 1:
        yield tree


def _divides_none(prime: int, sizes: Sequence[int]) -> bool:
    return all(math.gcd(prime, size) == 1 for size in sizes)
