"""A candidate whose long sequences run otherwise than the rest is two to estimate, and one answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autofit.memory.estimate import Estimate, needed_bytes
from autofit.space.candidate import Candidate


def forms_of(candidate: Candidate, layers: int, offloads: bool) -> tuple[Candidate, ...]:
    """What of a candidate is estimated: its usual micro-batches first, then a long sequence alone.

    Args:
        layers, offloads: see `Candidate.alone`.
    """
    if candidate.has_long_rows:
        return candidate.usual(), candidate.alone(layers, offloads)
    return (candidate.usual() if candidate.layout == "packed" else candidate,)


def combined(forms: tuple[Candidate, ...], found: Mapping[Candidate, Estimate]) -> Estimate:
    """The memory of whichever form needs most, and the speed of the usual one.

    Raises:
        KeyError: of one there is no estimate.
    """
    most = max((found[form] for form in forms), key=needed_bytes)
    return replace(most, tokens_per_second=found[forms[0]].tokens_per_second)
