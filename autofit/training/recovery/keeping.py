"""Values as they were: what an optimizer's step changes besides the weights, kept and put back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from autofit.training.recovery.random_states import RandomStates

# Attributes that no step changes, or that are kept otherwise; hooks, and what recovery itself has put there.
_OTHERWISE = ("state", "param_groups", "defaults")
_NOT_OURS = ("_optimizer_", "_autofit")


class Kept:
    """A value at one moment: tensors, arrays, numbers, what holds them and, where asked, the attributes of objects.

    Args:
        within: also look into objects.
        without: the ids of values that are not copied.
    """

    def __init__(self, value: Any, within: bool = False, without: frozenset[int] = frozenset()) -> None:
        self._value = value
        self._copy: Any = None
        if id(value) in without:
            return
        if torch.is_tensor(value):
            self._copy = value.detach().clone()
        elif isinstance(value, np.ndarray):
            self._copy = value.copy()
        elif isinstance(value, dict):
            self._copy = {name: Kept(one, within, without) for name, one in value.items()}
        elif isinstance(value, (list, tuple)):
            self._copy = [Kept(one, within, without) for one in value]
        elif within and type(value).__module__ != "builtins" and hasattr(value, "__dict__"):
            self._copy = Kept(vars(value), without=without)

    def restore(self) -> Any:
        """The value, which is again as it was: the same objects, for others may know them. Needs no memory."""
        value, kept = self._value, self._copy
        if torch.is_tensor(kept):
            with torch.no_grad():
                value.copy_(kept)
        elif isinstance(kept, np.ndarray):
            value[...] = kept
        elif isinstance(kept, dict):
            found = {name: one.restore() for name, one in kept.items()}
            value.clear()
            value.update(found)
        elif isinstance(kept, list):
            parts = [one.restore() for one in kept]
            if isinstance(value, list):
                value[:] = parts
        elif isinstance(kept, Kept):
            kept.restore()
        return value

    def equals(self, other: Kept, tolerance: float = 0.0) -> bool:
        """Whether the two were of equal values then; of floats, up to so much of the largest."""
        one, another = self._copy, other._copy
        if type(one) is not type(another):
            return False
        if torch.is_tensor(one):
            return one.shape == another.shape and _are_close(one, another, tolerance)
        if isinstance(one, np.ndarray):
            return np.array_equal(one, another)
        if isinstance(one, dict):
            return one.keys() == another.keys() and all(one[name].equals(another[name], tolerance) for name in one)
        if isinstance(one, list):
            pairs = zip(one, another, strict=False)
            return len(one) == len(another) and all(a.equals(b, tolerance) for a, b in pairs)
        if isinstance(one, Kept):
            return one.equals(another, tolerance)
        if isinstance(self._value, float) and isinstance(other._value, float):
            return math.isclose(self._value, other._value, rel_tol=tolerance)
        return self._value is other._value or bool(self._value == other._value)


def _are_close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    if not tolerance or not one.is_floating_point() or one.numel() == 0:
        return torch.equal(one, other)
    return bool((one - other).abs().max() <= tolerance * one.abs().max())


class Common:
    """What the parameters of an optimizer have in common, at one moment: values of groups, attributes, other states."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        without = frozenset(id(p) for group in optimizer.param_groups for p in group["params"])
        self.groups = [
            Kept({name: value for name, value in group.items() if name != "params"}, without=without)
            for group in optimizer.param_groups
        ]
        self.rest = Kept((_attributes(optimizer), _other_states(optimizer)), without=without)

    def restore(self) -> None:
        """All of it as it was."""
        optimizer = self._optimizer
        for group, kept in zip(optimizer.param_groups, self.groups, strict=True):
            parameters = group["params"]
            group.clear()
            group.update({"params": parameters, **kept.restore()})
        attributes, states = self.rest.restore()
        for name in _attributes(optimizer).keys() - attributes.keys():
            delattr(optimizer, name)
        vars(optimizer).update(attributes)
        for name in _other_states(optimizer).keys() - states.keys():
            del optimizer.state[name]
        optimizer.state.update(states)


class Draws:
    """The random numbers that a step may draw: everybody's, and those of generators that the optimizer has."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._random = RandomStates()
        held = [*vars(optimizer).values(), *(value for group in optimizer.param_groups for value in group.values())]
        self._own = [(one, one.get_state()) for one in held if isinstance(one, torch.Generator)]

    def restore(self) -> None:
        """The same are drawn again."""
        self._random.restore()
        for generator, state in self._own:
            generator.set_state(state)


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(optimizer).items()
        if name not in _OTHERWISE and not name.startswith(_NOT_OURS) and not callable(value)
    }


def _other_states(optimizer: Optimizer) -> dict[Any, Any]:
    """Those that are of no parameter."""
    return {name: value for name, value in optimizer.state.items() if not torch.is_tensor(name)}
