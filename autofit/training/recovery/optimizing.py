"""An optimizer's step that happens or does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch.optim import Optimizer

from autofit.errors import OutOfBudget
from autofit.training.recovery.faults import Record, Watch, free_memory

_ATTEMPTS = 2


def all_or_nothing(optimizer: Optimizer, record: Record) -> None:
    """From now on the optimizer's `step` survives running out of memory in the middle of it.

    It is undone and done again; where there is no room for that at once, it is done parameter by parameter.

    Raises (from `step`):
        OutOfBudget: not even a single parameter's step fits. No parameter has half a step then.
    """
    own: Any = getattr(optimizer, "optimizer", optimizer)  # not accelerate's wrapper, of a training before
    if hasattr(own, "_autofit_step"):
        return
    genuine = own._autofit_step = own.step

    def step(optimizer: Optimizer, closure: Any = None) -> Any:
        if closure is not None:
            return genuine(closure)  # it computes gradients itself: not ours to repeat
        _step(optimizer, genuine, record)
        return None

    own.step = MethodType(step, own)  # schedulers wrap methods only


def _step(optimizer: Optimizer, genuine: Callable[[], Any], record: Record) -> None:
    moving = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for _ in range(_ATTEMPTS):
        if _undoable(optimizer, genuine, moving, record, "did it again"):
            return
    gradients = [p.grad for p in moving]
    for parameter in moving:
        parameter.grad = None
    try:
        for parameter, gradient in zip(moving, gradients, strict=True):
            parameter.grad = gradient  # optimizers leave alone what has none
            if not any(_undoable(optimizer, genuine, [parameter], record, "one by one") for _ in range(_ATTEMPTS)):
                raise OutOfBudget("optimizer.step does not fit, not even for one parameter after the other")
            parameter.grad = None
    finally:
        for parameter, gradient in zip(moving, gradients, strict=True):
            parameter.grad = gradient


def _undoable(
    optimizer: Optimizer, genuine: Callable[[], Any], moving: Sequence[torch.Tensor], record: Record, did: str
) -> bool:
    """The step of these parameters, all of it; or none of it, and False."""
    kept: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any] | None]] = []
    versions = [p._version for p in moving]
    with Watch() as watch:
        for p in [] if _takes_nothing(optimizer, moving) else moving:
            state = optimizer.state.get(p)
            # Before there are states, on the host: on the device the states would be put around a hole.
            values = p.detach().to("cpu", copy=True) if state is None else p.detach().clone()
            kept.append((p, values, None if state is None else _copy(state)))
    if watch.fault is None:
        with Watch() as watch:
            genuine()
            return True
        if not kept and [p._version for p in moving] != versions:
            raise OutOfBudget("optimizer.step ran out of memory half way")
        for p, values, state in kept:
            p.data.copy_(values)
            if state is None:
                optimizer.state.pop(p, None)
            else:
                optimizer.state[p] = state  # the copies themselves: this needs no memory
    kept.clear()
    free_memory()
    record.oom(watch, "optimizer", did)
    return False


def _takes_nothing(optimizer: Optimizer, moving: Sequence[torch.Tensor]) -> bool:
    """Whether a step allocates nothing that could fail half way: torch's fused one, once its states are there."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and all(optimizer.state.get(p) for p in moving)


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if torch.is_tensor(value) else value for name, value in state.items()}
