"""An optimizer's step that happens or does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as of_torch

from autofit.errors import OutOfBudget
from autofit.training.recovery.alone import each_alone, is_known, why_not_alone
from autofit.training.recovery.faults import Record, free_memory
from autofit.training.recovery.keeping import Common, Draws, Kept

_ATTEMPTS = 2
_NOT_EVEN = "optimizer.step does not fit, not even for one parameter after the other"
_TWICE = "optimizer.step ran out of memory after {}: again it might do so twice"


def all_or_nothing(optimizer: Optimizer, record: Record, moved: Callable[[], None] = lambda: None) -> None:
    """From now on the optimizer's `step` survives running out of memory in the middle of it.

    It is undone and done again, with the same random numbers; where there is no room for that at once, it is done
    parameter by parameter.

    Args:
        moved: is called as soon as a step, or a part of one, will not be undone any more.

    Raises (from `step`):
        OutOfBudget: not even a single parameter's step fits, or parameter by parameter is not what it does. No
            parameter has half a step then.
    """
    own: Any = getattr(optimizer, "optimizer", optimizer)  # not accelerate's wrapper, of a training before
    known = hasattr(own, "_autofit_step")
    own._autofit_teller = (record, moved)  # of this training
    if known:
        return
    genuine = own._autofit_step = own.step

    def step(optimizer: Any, closure: Any = None) -> Any:
        record, moved = optimizer._autofit_teller
        if closure is not None:
            moved()
            return genuine(closure)  # it computes gradients itself: not ours to repeat
        _Step(optimizer, genuine, record, moved).take()
        return None

    own.step = MethodType(step, own)  # schedulers wrap methods only


class _Step:
    def __init__(
        self, optimizer: Optimizer, genuine: Callable[[], Any], record: Record, moved: Callable[[], None]
    ) -> None:
        self._optimizer, self._genuine, self._record, self._moved = optimizer, genuine, record, moved

    def take(self) -> None:
        moving = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        for _ in range(_ATTEMPTS):
            if self._undoable(moving, "did it again"):
                self._moved()
                return
        with self._record.watch() as watch:
            why = "hooks would run for each" if _has_hooks(self._optimizer) else why_not_alone(self._optimizer, moving)
            if why is not None:
                raise OutOfBudget(f"optimizer.step does not fit; one parameter after the other is another step: {why}")
            each_alone(self._optimizer, moving, self._alone)
            return
        self._record.oom(watch, "optimizer", "gave up")
        raise OutOfBudget(_NOT_EVEN)

    def _alone(self, parameter: torch.Tensor) -> None:
        if not any(self._undoable([parameter], "one by one") for _ in range(_ATTEMPTS)):
            raise OutOfBudget(_NOT_EVEN)
        self._moved()

    def _undoable(self, moving: Sequence[torch.Tensor], did: str) -> bool:
        """The step of these parameters, all of it; or none of it, and False."""
        optimizer = self._optimizer
        kept: list[tuple[torch.Tensor, torch.Tensor, Kept | None]] = []
        versions, gradients = _versions(moving), _versions(p.grad for p in moving)
        with self._record.watch() as watch:
            # Of torch's none draws a number, or changes what its parameters have in common.
            others: list[Common | Draws] = [] if _is_torch_s(optimizer) else [Common(optimizer), Draws(optimizer)]
            for p in [] if _takes_nothing(optimizer, moving) else moving:
                state = optimizer.state.get(p)
                # Before there are states, on the host: on the device the states would be put around a hole.
                values = p.detach().to("cpu", copy=True) if state is None else p.detach().clone()
                kept.append((p, values, None if state is None else Kept(state, within=True)))
        begun = watch.fault is None
        if begun:
            with self._record.watch() as watch:
                self._genuine()
                return True
            if not kept and _versions(moving) != versions:
                self._moved()
                raise OutOfBudget("optimizer.step ran out of memory half way")
            for p, values, state in kept:
                p.data.copy_(values)
                if state is None:
                    optimizer.state.pop(p, None)
                else:
                    optimizer.state[p] = state.restore()
            for other in others:
                other.restore()
        kept.clear()
        free_memory()
        self._record.oom(watch, "optimizer", did)
        if _versions(p.grad for p in moving) != gradients and not _only_reads_gradients(optimizer):
            raise OutOfBudget(_TWICE.format("it had changed gradients"))
        if begun and _has_hooks(optimizer):
            raise OutOfBudget(_TWICE.format("hooks may have run"))
        return False


def _is_torch_s(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim.")


def _versions(tensors: Any) -> list[int]:
    return [tensor._version for tensor in tensors]


def _only_reads_gradients(optimizer: Any) -> bool:
    """Whatever their versions say: kernels declare all they are given as written to."""
    return is_known(optimizer) and getattr(optimizer, "grad_scale", None) is None


def _has_hooks(optimizer: Optimizer) -> bool:
    own = [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]
    return bool(own or of_torch._global_optimizer_pre_hooks or of_torch._global_optimizer_post_hooks)


def _takes_nothing(optimizer: Optimizer, moving: Sequence[torch.Tensor]) -> bool:
    """Whether a step allocates nothing that could fail half way: torch's fused one, once its states are there."""
    if not all(group.get("fused") for group in optimizer.param_groups):
        return False
    if len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups):
        return all(optimizer.state.values())
    return all(optimizer.state.get(p) for p in moving)  # which takes longer
