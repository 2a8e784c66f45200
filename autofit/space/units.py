"""Bytes as people write them, and back. Inside the project every size is an `int` of bytes."""

from __future__ import annotations

import re

from autofit.errors import UsageError

MIB = 2**20

_FACTORS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")


def parse_bytes(text: str) -> int:
    """Bytes for `24GB` (24·10⁹), `24GiB` (24·2³⁰), `24576MiB`, `123456B`.

    Raises:
        UsageError: the text is not a positive number with one of these units.
    """
    match = _PATTERN.fullmatch(text)
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f"{text!r} is not a size in bytes; write it like 24GB, 24GiB, 24576MiB or 123456B")
    if len(match[1]) > 20:
        raise UsageError(f"{text[:20]!r}… is no size that any device has")
    size = round(float(match[1]) * factor)
    if size <= 0:
        raise UsageError(f"{text!r} is not a size above zero")
    return size


def format_bytes(size: float) -> str:
    """`18.42 GB`, `3.1 MB`, `512 B`: decimal units, as budgets are written."""
    for factor, unit, digits in ((10**9, "GB", 2), (10**6, "MB", 1), (10**3, "kB", 1)):
        if abs(size) >= factor:
            return f"{size / factor:.{digits}f} {unit}"
    return f"{size:.0f} B"
