"""A second optimizer step from the first: the same allocations again, with the optimizer's states already there."""

from __future__ import annotations

from dataclasses import replace

from autofit.memory.splice import Unspliceable
from autofit.memory.trace import AFTER, BACKWARD, FORWARD, FREED, WORKSPACES, Trace

_FOR_GOOD = (WORKSPACES, "optimizer")


def repeat_step(trace: Trace) -> Trace:
    """The trace of one optimizer step, followed by a second one.

    What the first step leaves for good (workspaces, states) is not made again. What else it leaves (its losses) is let
    go once the second has stepped. What was there before it and went in it (its batch) is made again.

    Raises:
        Unspliceable: a layer keeps something of its own from step to step (a recurrent state).
    """
    begin, first = next((event, operation) for event, operation, section in trace.sections if section.step)
    stepped = next(event for event, _, section in trace.sections if section.kind == AFTER)
    for_good = {key for key, label in trace.labels.items() if label in _FOR_GOOD}
    born, left = _born_and_left(trace, begin)
    if (left - for_good) & _made_in_layers(trace):
        raise Unspliceable("a layer keeps something from step to step: both have to be traced")
    offset = max(trace.keys)
    keys, sizes = [*trace.keys], [*trace.sizes]
    labels, growth = {**trace.labels}, {**trace.growth}
    place: dict[int, int] = {}
    for key, size in _batch(trace, begin):
        keys.append(key + offset)
        sizes.append(size)
        born.add(key)
        if key in trace.growth:
            growth[key + offset] = trace.growth[key]
    for event in range(begin, len(trace.keys)):
        if event == stepped:
            keys.extend(sorted(left - for_good))
            sizes.extend([FREED] * len(left - for_good))
        place[event] = len(keys)
        key, size = trace.keys[event], trace.sizes[event]
        if key in for_good or key not in born:
            continue
        again = key + offset
        keys.append(again)
        sizes.append(size)
        if size != FREED and key in trace.labels:
            labels[again] = trace.labels[key]
        if size != FREED and key in trace.growth:
            growth[again] = trace.growth[key]
    steps = max(section.step for _, _, section in trace.sections)
    later = [
        (place.get(event, len(keys)), operation - first + len(trace.flops), replace(section, step=section.step + steps))
        for event, operation, section in trace.sections
        if section.step
    ]
    return Trace(
        keys=keys,
        sizes=sizes,
        sections=[*trace.sections, *later],
        flops=[*trace.flops, *trace.flops[first:]],
        moved=[*trace.moved, *trace.moved[first:]],
        grows=[*trace.grows, *trace.grows[first:]],
        labels=labels,
        guesses=trace.guesses,
        growth=growth,
    )


def _made_in_layers(trace: Trace) -> set[int]:
    """Allocations of the layers' forward and backward passes."""
    ends = [event for event, _, _ in trace.sections[1:]] + [len(trace.keys)]
    found: set[int] = set()
    for (begin, _, section), end in zip(trace.sections, ends, strict=True):
        if section.kind in (FORWARD, BACKWARD) and section.layer >= 0:
            found.update(trace.keys[begin:end])
    return found


def _batch(trace: Trace, begin: int) -> list[tuple[int, int]]:
    """(key, bytes) of what was there before the step and goes in it."""
    gone = {key for key, size in zip(trace.keys[begin:], trace.sizes[begin:], strict=True) if size == FREED}
    before = zip(trace.keys[:begin], trace.sizes[:begin], strict=True)
    return [(key, size) for key, size in before if size != FREED and key in gone]


def _born_and_left(trace: Trace, begin: int) -> tuple[set[int], set[int]]:
    """Allocations that the step makes, and those of them that it leaves."""
    born: set[int] = set()
    left: set[int] = set()
    for key, size in zip(trace.keys[begin:], trace.sizes[begin:], strict=True):
        if size != FREED:
            born.add(key)
            left.add(key)
        else:
            left.discard(key)
    return born, left
