"""Which layers of a model must be traced so that all of them are known.

A layer's part of a step depends on what it is (its kind) and on what stands before and after it. So it is enough to
trace a few layers in which every such neighbourhood of the whole model occurs.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

from torch import nn

from autofit.step.model import checkpointable_layers

_EDGE = object()
_Kind = TypeVar("_Kind", bound=Hashable)


def kept_layers(kinds: Sequence[Hashable], reach: int = 1) -> list[int]:
    """Indices of layers, in order, whose kinds in a row show every neighbourhood that the whole row has.

    A neighbourhood is a layer's kind with those of the `reach` layers before and after it.
    """
    return _fewest(kinds, set(_neighbourhoods(kinds, reach)), reach)


def shared_row(rows: Sequence[Sequence[_Kind]], reach: int = 1) -> list[_Kind] | None:
    """Kinds in a row that show every neighbourhood of all these rows; None where rows begin or end differently."""
    joined = [kind for row in rows for kind in row]
    wanted = {neighbourhood for row in rows for neighbourhood in _neighbourhoods(row, reach)}
    if not wanted <= set(_neighbourhoods(joined, reach)):
        return None
    return [joined[i] for i in _fewest(joined, wanted, reach)]


def _fewest(kinds: Sequence[Hashable], wanted: set[Hashable], reach: int) -> list[int]:
    """Indices that are left when no more can be taken out without losing a wanted neighbourhood."""
    kept = list(range(len(kinds)))
    size = len(kept) // 2
    while size:
        start = 0
        while start + size <= len(kept):
            fewer = kept[:start] + kept[start + size :]
            if wanted <= set(_neighbourhoods([kinds[i] for i in fewer], reach)):
                kept = fewer
            else:
                start += 1
        size = min(size - 1, len(kept) // 2)
    return kept


def stands_for(kinds: Sequence[Hashable], kept: Sequence[int], reach: int = 1) -> list[int]:
    """For every layer of the whole row the position, among the kept ones, of one with the same neighbourhood."""
    return places_in([kinds[i] for i in kept], kinds, reach)


def places_in(shown: Sequence[Hashable], kinds: Sequence[Hashable], reach: int = 1) -> list[int]:
    """The same, where the kept ones are a row of their own."""
    places: dict[Hashable, int] = {}
    for position, neighbourhood in enumerate(_neighbourhoods(shown, reach)):
        places.setdefault(neighbourhood, position)
    return [places[neighbourhood] for neighbourhood in _neighbourhoods(kinds, reach)]


def _neighbourhoods(kinds: Sequence[Hashable], reach: int) -> list[Hashable]:
    row = [*[_EDGE] * reach, *kinds, *[_EDGE] * reach]
    return [tuple(row[i : i + 2 * reach + 1]) for i in range(len(kinds))]


def layer_kinds(base: nn.Module) -> list[Hashable]:
    """What tells a model's checkpointable layers apart: their modules, shapes and settings, their index aside."""
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if config is not None else None
    layers = checkpointable_layers(base)
    types = getattr(text, "layer_types", None)
    if not isinstance(types, (list, tuple)) or len(types) != len(layers):
        types = [None] * len(layers)
    return [(kind, _signature(layer)) for kind, layer in zip(types, layers, strict=True)]


def _signature(layer: nn.Module) -> Hashable:
    parts: list[Hashable] = []
    for name, module in layer.named_modules():
        settings = tuple(
            (key, value)
            for key, value in vars(module).items()
            if key not in ("layer_idx", "layer_id", "layer_number", "training") and _is_setting(value)
        )
        shapes = tuple((key, tuple(p.shape), p.dtype) for key, p in module.named_parameters(recurse=False))
        parts.append((name, type(module), settings, shapes))
    return tuple(parts)


def _is_setting(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def keep_layers(base: nn.Module, kept: Sequence[int]) -> bool:
    """Takes the other layers out of the model and of its config; whether the model is one that this can be done to."""
    layers = checkpointable_layers(base)
    holders = [m for m in base.modules() if isinstance(m, nn.ModuleList) and list(m) == layers]
    if len(holders) != 1:
        return False
    shrunk = nn.ModuleList([layers[i] for i in kept])
    for module in base.modules():
        for name, child in list(module.named_children()):
            if child is holders[0]:
                setattr(module, name, shrunk)
    base.config = _shrunk_config(base.config, len(layers), kept)
    for module in base.modules():
        if module is not base and hasattr(module, "config"):
            module.config = base.config.get_text_config()  # type: ignore[union-attr, operator]
    return True


def _shrunk_config(config: Any, count: int, kept: Sequence[int]) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(text, name, [value[i] for i in kept])
    text.num_hidden_layers = len(kept)
    return config
