"""Which candidates a plan estimates: rung by rung of what changes the result, all that makes sense of what does not."""

from __future__ import annotations

from collections.abc import Iterator

from autofit.space.candidate import LOSSY, Candidate
from autofit.space.ladder import RUNGS, Limits, knob_values, with_knob

# A shorter sequence is only reached where nothing else fits: more rows than these would not fit either.
_MOST_ROWS_ONCE_CUT = 4
_SHORTEST_OF_FRONTIER = 512


def plan_rungs(wish: Candidate, limits: Limits, order: tuple[str, ...]) -> list[list[Candidate]]:
    """The space in the order in which it is given up: first as asked, then one lossy step after the other.

    Within a rung the lossy knobs are the same, and the lossless ones that `order` has reached by then take every
    combination that makes sense. A knob that `order` does not name stays as wished.
    """
    rungs: list[list[Candidate]] = []
    seen: set[Candidate] = set()
    for start, reached in _starts(wish, limits, order):
        rung = [c for c in _lossless(start, wish, limits, reached) if c not in seen]
        seen.update(rung)
        if rung:
            rungs.append(rung)
    return rungs


def _starts(wish: Candidate, limits: Limits, order: tuple[str, ...]) -> Iterator[tuple[Candidate, tuple[str, ...]]]:
    """The wish with each choice of lossy values, and the names of the lossless knobs that come before the next one."""
    start = wish
    reached: tuple[str, ...] = ()
    for name in order:
        knob = RUNGS[name]
        if knob not in LOSSY:
            reached = (*reached, name)
            continue
        yield start, reached
        for value in knob_values(knob, wish, limits)[1:]:
            start = with_knob(start, knob, value, limits)
            yield start, reached
    yield start, reached


def plan_space(wish: Candidate, limits: Limits, order: tuple[str, ...]) -> list[Candidate]:
    """All candidates of all rungs, each once: some hundred."""
    return [c for rung in plan_rungs(wish, limits, order) for c in rung]


def lean_ones(rung: list[Candidate]) -> list[Candidate]:
    """Those of a rung that recompute most: where none of these fits, hardly another does.

    Offloading all is left out if it can be: where every layer recomputes, offloading what they keep is nearly as much.
    """
    most = max(candidate.checkpointed_layers for candidate in rung)
    lean = [candidate for candidate in rung if candidate.checkpointed_layers == most]
    return [candidate for candidate in lean if candidate.offload_activations != "all"] or lean


def least_memory(wish: Candidate, limits: Limits, order: tuple[str, ...]) -> list[Candidate]:
    """The lossless combinations that need least and come before anything lossy is given up.

    Nothing says which of them needs least.
    """
    order = [reached for start, reached in _starts(wish, limits, order) if start == wish][-1]
    rows = _values("micro_batch_size", wish, limits, order)[-1]
    layers = _values("checkpointed_layers", wish, limits, order)[-1]
    base = with_knob(with_knob(wish, "micro_batch_size", rows, limits), "checkpointed_layers", layers, limits)
    offloading = _values("offload_activations", base, limits, order)[:2]
    found = [c for o in offloading for c in _paged(with_knob(base, "offload_activations", o, limits), limits, order)]
    return list(dict.fromkeys(found))


def frontier_space(chosen: Candidate, limits: Limits, order: tuple[str, ...], longest: int) -> list[Candidate]:
    """Rows × length around a candidate, each with the fewest and the most layers checkpointed, nothing offloaded.

    Args:
        longest: tokens; no length goes beyond it.
    """
    wish = chosen.replace(checkpointed_layers=0, tokens_per_micro_batch=None, pace_length=None)
    if "checkpointed_layers" in limits.pins:
        wish = chosen.replace(tokens_per_micro_batch=None, pace_length=None)
    layers = _values("checkpointed_layers", wish, limits, order)
    lengths = {chosen.max_seq_length}
    length = _SHORTEST_OF_FRONTIER
    while length <= min(longest, 4 * chosen.max_seq_length):
        lengths.add(length)
        length *= 2
    rows = _frontier_rows(chosen, limits)
    return [
        with_knob(wish.replace(max_seq_length=length, micro_batch_size=n), "checkpointed_layers", count, limits)
        for length in sorted(lengths)
        for n in rows
        for count in dict.fromkeys((layers[0], layers[-1]))
    ]


def _frontier_rows(chosen: Candidate, limits: Limits) -> list[int]:
    if "micro_batch_size" in limits.pins:
        return [chosen.micro_batch_size]
    batch = limits.global_batch_size
    return sorted({n for k in range(17) if (n := 2**k) <= batch} | {batch})


def _lossless(start: Candidate, wish: Candidate, limits: Limits, order: tuple[str, ...]) -> list[Candidate]:
    rows = _rows(wish, limits, order)
    layers = _layers(wish, limits, order)
    if start.max_seq_length < wish.max_seq_length:
        fewest = rows[-1]
        rows = [n for n in rows if n <= max(_MOST_ROWS_ONCE_CUT, fewest)]
        layers = list(dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1])))
    found: list[Candidate] = []
    for n in rows:
        for count in layers:
            kept = with_knob(with_knob(start, "micro_batch_size", n, limits), "checkpointed_layers", count, limits)
            found += _offloaded(kept, layers, limits, order)
    return list(dict.fromkeys(found))


def _rows(wish: Candidate, limits: Limits, order: tuple[str, ...]) -> list[int]:
    """Powers of two and divisors of the global batch, as the ladder's values go; the wished and the least stay."""
    values = [n for n in _values("micro_batch_size", wish, limits, order) if isinstance(n, int)]
    batch = limits.global_batch_size
    ends = (values[0], values[-1])
    return [n for n in values if n in ends or n & (n - 1) == 0 or batch % n == 0]


def _layers(wish: Candidate, limits: Limits, order: tuple[str, ...]) -> list[int | str]:
    """Eighths of the layers, where the ladder goes by quarters: estimates are cheap."""
    quarters = _values("checkpointed_layers", wish, limits, order)
    if len(quarters) == 1 or limits.stock:
        return quarters
    eighths = {limits.checkpointable_layers * k // 8 for k in range(1, 9)}
    return [wish.checkpointed_layers, *sorted(n for n in eighths if n > wish.checkpointed_layers)]


def _offloaded(
    candidate: Candidate, layers: list[int | str], limits: Limits, order: tuple[str, ...]
) -> Iterator[Candidate]:
    """The candidate with each level of offloading, and paged where all else that saves memory is in use.

    Half the layers, or all, or none: offloading in between says nothing new. Paging saves the adapters' states alone.
    """
    count = candidate.checkpointed_layers
    levels = _values("offload_activations", candidate, limits, order)
    if count not in (layers[0], layers[len(layers) // 2], layers[-1]):
        levels = levels[:1]
    for level in levels:
        made = with_knob(candidate, "offload_activations", level, limits)
        yield from _paged(made, limits, order) if count == layers[-1] else (made,)


def _paged(candidate: Candidate, limits: Limits, order: tuple[str, ...]) -> Iterator[Candidate]:
    for optimizer in _values("optimizer", candidate, limits, order):
        yield with_knob(candidate, "optimizer", optimizer, limits)


def _values(knob: str, wish: Candidate, limits: Limits, order: tuple[str, ...]) -> list[int | str]:
    movable = any(RUNGS[name] == knob for name in order)
    return knob_values(knob, wish, limits) if movable else [getattr(wish, knob)]
