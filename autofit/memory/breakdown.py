"""Where the memory is at the moment of the peak."""

from __future__ import annotations

from dataclasses import dataclass

from autofit.memory.trace import BETWEEN, FREED, Section, Trace

# In the order in which they are told. The last two are what the allocator and the driver add.
PARTS = (
    "weights",
    "adapters",
    "buffers",
    "batch",
    "gradients",
    "optimizer",
    "activations",
    "logits and loss",
    "transient",
    "workspaces",
    "allocator slack",
    "context",
)


@dataclass(frozen=True)
class Peak:
    """The most bytes alive at once.

    Attributes:
        live_bytes: of all tensors and scratch, as they were asked for.
        section: where in the step that is.
        parts: bytes by what they are (`PARTS`, without the last two).
    """

    live_bytes: int
    section: Section
    parts: dict[str, int]


def find_peak(trace: Trace) -> Peak:
    """The peak of a trace's steps. Building the model is none: what it took beside is given back before the first."""
    sizes = [0] * (1 + max(trace.keys, default=0))
    begin = next(event for event, _, section in trace.sections if section.step)
    live = most = 0
    at = -1
    for event, (key, size) in enumerate(zip(trace.keys, trace.sizes, strict=True)):
        if size == FREED:
            live -= sizes[key]
            continue
        sizes[key] = size
        live += size
        if event >= begin and live > most:
            most, at = live, event
    section = max((s for s in trace.sections if s[0] <= at), key=lambda s: s[0])[2]
    return Peak(most, section, _parts(trace, at, section))


def _parts(trace: Trace, at: int, peak: Section) -> dict[str, int]:
    """What is alive right after event `at`."""
    born: dict[int, Section] = {}
    alive: dict[int, int] = {}
    sections = iter([*trace.sections, (len(trace.keys), 0, peak)])
    _, _, section = next(sections)
    following = next(sections)
    for event in range(at + 1):
        while event >= following[0]:
            section = following[2]
            following = next(sections)
        key, size = trace.keys[event], trace.sizes[event]
        if size == FREED:
            del alive[key]
        else:
            alive[key] = size
            born[key] = section
    parts = dict.fromkeys(PARTS[:-2], 0)
    for key, size in alive.items():
        label = trace.labels.get(key)
        if label is None:
            label = _by_birth(born[key], peak)
        parts[label] += size
    return parts


def _by_birth(born: Section, peak: Section) -> str:
    """A tensor without a label is named by where it was made: kept since then, or made where the peak is."""
    if born.step == 0:
        return "batch"
    if born.kind == BETWEEN:
        return "logits and loss"
    return "transient" if born == peak else "activations"
