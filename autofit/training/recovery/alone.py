"""An optimizer's step taken one parameter after the other, where that is the same step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from autofit.errors import OutOfBudget
from autofit.training.recovery.keeping import Common, Draws, Kept
from autofit.trial.classify import classify_exception

# Their steps treat each parameter by itself.
_KNOWN = ("torch.optim.", "bitsandbytes.optim.")
# What is tried out: two steps of two small parameters of a group, with gradients of such norms.
_NORMS = ((3.0, 50.0), (0.2, 0.1))
_SIDE = 8
_RATE = 0.1  # a schedule's may be zero
# Of the largest value. What mixes parameters differs by more; what does not, by rounding.
_TOLERANCE = 1e-4


def is_known(optimizer: Optimizer) -> bool:
    """Whether it is a class that treats each parameter by itself, and leaves gradients as they are."""
    return f"{type(optimizer).__module__}.".startswith(_KNOWN)


def each_alone(optimizer: Optimizer, moving: Sequence[torch.Tensor], step: Callable[[torch.Tensor], None]) -> None:
    """Calls `step` with one after the other being the only one that has a gradient: optimizers leave alone the others.

    What parameters have in common (counters of a group, say) each finds as it was before, and is left as after one
    step. Random numbers are drawn on and on, as in a step of all.

    Raises:
        OutOfBudget: what they have in common depends on which parameter it was.
    """
    place = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    idle = set(range(len(optimizer.param_groups))) - {place[id(p)] for p in moving}
    before, after = Common(optimizer), dict[int, Kept]()
    gradients = [p.grad for p in moving]
    for parameter in moving:
        parameter.grad = None
    try:
        for parameter, gradient in zip(moving, gradients, strict=True):
            before.restore()
            parameter.grad = gradient
            step(parameter)
            parameter.grad = None
            _note(Common(optimizer), {place[id(parameter)], *idle}, after)
    finally:
        for parameter, gradient in zip(moving, gradients, strict=True):
            parameter.grad = gradient
    for number, group in enumerate(optimizer.param_groups):
        group.update(after[number].restore())


def _note(found: Common, groups: set[int], after: dict[int, Kept]) -> None:
    """How groups are after a step of one of their parameters, which must be as after that of any other."""
    seen = {**{number: found.groups[number] for number in groups}, -1: found.rest}
    if not all(after.setdefault(number, kept).equals(kept) for number, kept in seen.items()):
        raise OutOfBudget("optimizer.step does not fit, and one parameter after the other came to something else")


def why_not_alone(optimizer: Optimizer, moving: Sequence[torch.Tensor]) -> str | None:
    """Why one parameter after the other is not the step of all; None where it is.

    Of a class that is not known it is tried out, on small parameters: one may take the norm of all gradients, or
    decay weights that have none.
    """
    if not moving:
        return "no parameter has a gradient"
    if is_known(optimizer) or len(moving) == 1:
        return None
    name, draws, common = type(optimizer).__name__, Draws(optimizer), Common(optimizer)
    found = []
    for alone in (False, True):
        try:
            found.append(_tried(optimizer, moving, alone))
        except OutOfBudget:
            return f"{name} keeps for all what depends on each"
        except Exception as error:
            if classify_exception(error) is not None:
                raise
            return f"{name} could not be tried out: {type(error).__name__}: {error}"
        finally:
            common.restore()
            draws.restore()
    return None if found[0].equals(found[1], _TOLERANCE) else f"{name} takes parameters together"


def _tried(optimizer: Optimizer, moving: Sequence[torch.Tensor], alone: bool) -> Kept:
    """What steps of small parameters come to."""
    small, parameters = _small(optimizer, {id(p) for p in moving})
    draw = torch.Generator().manual_seed(1)
    for norms in _NORMS:
        for number, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=draw)
            parameter.grad = (gradient * norms[number % len(norms)] / gradient.norm()).to(parameter)
        if alone:
            each_alone(small, parameters, lambda parameter: type(small).step(small))
        else:
            type(small).step(small)
    states = [small.state.get(p) for p in parameters]
    groups = [{name: value for name, value in group.items() if name != "params"} for group in small.param_groups]
    return Kept([[p.detach() for p in parameters], states, groups], within=True)


def _small(optimizer: Optimizer, moving: set[int]) -> tuple[Optimizer, list[nn.Parameter]]:
    """An optimizer of the same class and settings, with a few small parameters and no states."""
    draw, groups = torch.Generator().manual_seed(0), []
    for group in optimizer.param_groups:
        like = [p for p in group["params"] if id(p) in moving][: len(_NORMS)]
        sizes = [[min(_SIDE, size) for size in p.shape] for p in like]
        parameters = [
            nn.Parameter(torch.randn(size, generator=draw).to(p)) for size, p in zip(sizes, like, strict=True)
        ]
        groups.append({**group, "params": parameters})
        if isinstance(group.get("lr"), float):
            groups[-1]["lr"] = _RATE
    small: Any = object.__new__(type(optimizer))
    vars(small).update({name: value for name, value in vars(optimizer).items() if not name.startswith("_autofit")})
    vars(small).pop("step", None)
    small.param_groups, small.state = groups, defaultdict(dict)
    return small, [p for group in groups for p in group["params"]]
