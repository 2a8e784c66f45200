"""The whole model's events from those of a few traced layers.

Every stretch of a layer (its weights, its forward, its backward, its turn in the optimizer) is repeated for each layer
that the traced one stands for. What it lets go of is found again by where it came from: the layer itself, the one
before or after, or what belongs to no layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from autofit.memory.trace import BACKWARD, FREED, WORKSPACES, Section, Trace


class Unspliceable(Exception):
    """A layer of this model reaches further than to its neighbours, or something to all layers: trace every one."""


@dataclass
class _Stretch:
    """Consecutive events of one section. `slot` tells a layer's stretches apart: (step, kind, nth time)."""

    slot: tuple[int, int, int]
    section: Section
    events: range
    operations: range


@dataclass
class _Born:
    """Where an allocation comes from: the `ordinal`-th of a stretch, `layer` in traced positions (−1: none)."""

    slot: tuple[int, int, int]
    layer: int
    ordinal: int


@dataclass
class _Whole:
    """The trace that is being put together, and the keys in it of each (slot, layer, ordinal)."""

    trace: Trace
    reach: int
    keys: dict[tuple[tuple[int, int, int], int, int], int] = field(default_factory=dict)
    workspaces: set[int] = field(default_factory=set)
    serial: int = 0


def splice(trace: Trace, layers: Sequence[int], reach: int = 1) -> Trace:
    """The trace of all layers; `layers[i]` is the traced layer that stands for layer i.

    `reach` is how many layers away a layer may let something go.

    Raises:
        Unspliceable: see there.
    """
    if list(layers) == list(range(len(layers))):
        return trace
    gathered = [i for i, traced in enumerate(layers) if traced in trace.gathered]
    if len(gathered) > 1:
        raise Unspliceable(f"the loss takes something from each of the layers {gathered}")
    stretches = _stretches(trace)
    births = _births(trace, stretches)
    whole = _Whole(Trace(guesses=trace.guesses), reach)
    run: list[_Stretch] = []
    for stretch in [*stretches, None]:
        if run and (stretch is None or stretch.section.layer < 0 or stretch.slot != run[0].slot):
            _emit_run(whole, trace, births, run, layers)
            run = []
        if stretch is None:
            break
        if stretch.section.layer >= 0:
            run.append(stretch)
        else:
            _emit(whole, trace, births, stretch, -1, layers)
    _check_what_is_left(whole, trace, births, layers)
    return whole.trace


def _stretches(trace: Trace) -> list[_Stretch]:
    """The sections as stretches."""
    ends = [(event, operation) for event, operation, _ in trace.sections[1:]]
    ends.append((len(trace.keys), len(trace.flops)))
    seen: dict[tuple[int, int, int], int] = {}
    stretches = []
    for (event, operation, section), (last_event, last_operation) in zip(trace.sections, ends, strict=True):
        place = (section.step, section.kind, section.layer)
        nth = seen[place] = seen.get(place, -1) + 1
        slot = (section.step, section.kind, nth)
        stretches.append(_Stretch(slot, section, range(event, last_event), range(operation, last_operation)))
    return stretches


def _births(trace: Trace, stretches: list[_Stretch]) -> dict[int, _Born]:
    births = {}
    for stretch in stretches:
        ordinal = 0
        for event in stretch.events:
            if trace.sizes[event] != FREED and trace.labels.get(trace.keys[event]) != WORKSPACES:
                births[trace.keys[event]] = _Born(stretch.slot, stretch.section.layer, ordinal)
                ordinal += 1
    return births


def _emit_run(
    whole: _Whole, trace: Trace, births: dict[int, _Born], run: list[_Stretch], layers: Sequence[int]
) -> None:
    """A run of layers' stretches, one for each layer of the whole model, in the order in which the run goes."""
    templates = {stretch.section.layer: stretch for stretch in run}
    if not set(layers) <= set(templates):
        raise Unspliceable(f"only layers {sorted(templates)} have a part in {run[0].section}")
    order = list(range(len(layers)))
    if run[0].section.kind == BACKWARD:
        order.reverse()
    for layer in order:
        _emit(whole, trace, births, templates[layers[layer]], layer, layers, closes=layer == order[-1])


def _emit(
    whole: _Whole,
    trace: Trace,
    births: dict[int, _Born],
    stretch: _Stretch,
    layer: int,
    layers: Sequence[int],
    closes: bool = True,
) -> None:
    """One stretch for one layer of the whole model (−1: a stretch that belongs to none).

    What `closes` a run lets go, of each layer that is another's likeness, of all that is still there.
    """
    out = whole.trace
    section = Section(stretch.section.step, stretch.section.kind, layer)
    out.sections.append((len(out.keys), len(out.flops), section))
    out.flops.extend(trace.flops[i] for i in stretch.operations)
    out.moved.extend(trace.moved[i] for i in stretch.operations)
    out.grows.extend(trace.grows[i] for i in stretch.operations)
    ordinal = 0
    for event in stretch.events:
        key, size = trace.keys[event], trace.sizes[event]
        if trace.labels.get(key) == WORKSPACES:
            if key in whole.workspaces:
                continue  # taken once, wherever the first product was
            whole.workspaces.add(key)
            whole.serial += 1
            out.labels[whole.serial] = WORKSPACES
            out.keys.append(whole.serial)
            out.sizes.append(size)
        elif size != FREED:
            whole.serial += 1
            whole.keys[stretch.slot, layer, ordinal] = whole.serial
            if key in trace.labels:
                out.labels[whole.serial] = trace.labels[key]
            if key in trace.growth:
                out.growth[whole.serial] = trace.growth[key]
            ordinal += 1
            out.keys.append(whole.serial)
            out.sizes.append(size)
        else:
            _let_go(whole, births[key], stretch, section, layers, closes)


def _let_go(
    whole: _Whole, born: _Born, stretch: _Stretch, section: Section, layers: Sequence[int], closes: bool
) -> None:
    """A release of the template, in the whole model."""
    places = _places(born, stretch.section.layer, section.layer, layers, whole.reach, closes)
    if born.layer < 0 and section.layer >= 0:
        # What belongs to no layer (a mask, the rotary embedding) lives until its last user is through.
        users = [i for i, traced in enumerate(layers) if traced == stretch.section.layer]
        if section.layer != (users[0] if section.kind == BACKWARD else users[-1]):
            return
    if closes:
        # A layer at an edge may leave to the head what another one leaves to its neighbour.
        places = [place for place in places if place in whole.keys]
    if not places and born.layer in layers:
        raise Unspliceable(f"{section} lets go of what nobody has")
    for place in places:
        freed = whole.keys.pop(place, None)
        if freed is None:
            raise Unspliceable(f"{section} lets go of what it has not")
        whole.trace.keys.append(freed)
        whole.trace.sizes.append(FREED)


def _check_what_is_left(whole: _Whole, trace: Trace, births: dict[int, _Born], layers: Sequence[int]) -> None:
    """Every layer must end with what the one that stands for it ends with."""
    alive: set[int] = set()
    for key, size in zip(trace.keys, trace.sizes, strict=True):
        (alive.remove if size == FREED else alive.add)(key)
    expected = Counter(births[key].layer for key in alive if key in births)
    found = Counter(layer for _, layer, _ in whole.keys)
    wrong = [i for i, traced in enumerate(layers) if found[i] != expected[traced]]
    if wrong or found[-1] != expected[-1]:
        raise Unspliceable(f"layers {wrong} do not end as those that stand for them")


def _places(
    born: _Born, template: int, layer: int, layers: Sequence[int], reach: int, closes: bool
) -> list[tuple[tuple[int, int, int], int, int]]:
    """Whose allocations a release of the template stands for, in the whole model."""
    if born.layer < 0:
        return [(born.slot, -1, born.ordinal)]
    distance = born.layer - template
    near = [(born.slot, layer + distance, born.ordinal)]
    if closes and distance:
        alike = [(born.slot, i, born.ordinal) for i, traced in enumerate(layers) if traced == born.layer]
        if not alike:  # it stands for no layer: its place is as far from the last one
            alike = [(born.slot, len(layers) - 1 - max(layers) + born.layer, born.ordinal)]
        return alike if layer < 0 or abs(distance) > reach else [*near, *(a for a in alike if a not in near)]
    if abs(distance) > reach:
        raise Unspliceable(f"layer {layer} reaches {abs(distance)} layers away")
    return near
