"""Knobs with values on a command line: `--pin lora_rank=64`."""

from __future__ import annotations

from typing import Any

from autofit.errors import UsageError
from autofit.space.ladder import check_knob


def knob_pairs(texts: list[str] | None, flag: str) -> dict[str, Any] | None:
    """`["lora_rank=64"]` as a dict, numbers as numbers.

    Raises:
        UsageError: no `=`, or the same knob twice.
    """
    if not texts:
        return None
    pairs: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise UsageError(f"{flag} {text!r}: write knob=value, like lora_rank=64")
        knob = check_knob(name.strip())
        if knob in pairs:
            raise UsageError(f"{flag} {knob} is given twice")
        try:
            pairs[knob] = int(value)
        except ValueError:
            pairs[knob] = value.strip()
    return pairs
