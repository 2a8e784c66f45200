"""Clipping that happens or does not, under loss scaling too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from autofit.errors import OutOfBudget
from autofit.training.recovery.faults import Record, Watch, retried


class ClipsWhole:
    """Mixed into a trainer class, before it."""

    recovery: Record

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        stock = super()._clip_grad_norm  # type: ignore[misc]
        return self._whole(lambda: stock(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        stock = super()._get_grad_norm  # type: ignore[misc]
        return self._whole(lambda: stock(model, grad_norm=grad_norm))

    def _whole(self, clip: Callable[[], Any]) -> Any:
        trainer: Any = self
        with _in_parts(trainer.accelerator, self.recovery), Watch() as watch:
            return clip()
        # Somebody's own: how far it came is not to be seen, for not every change in place counts a version.
        raise OutOfBudget(f"clipping ran out of memory, perhaps half way: again it might clip twice; {watch.fault}")


@contextlib.contextmanager
def _in_parts(accelerator: Any, record: Record) -> Iterator[None]:
    """While it is open, accelerate's clip is done in parts, each of which changes nothing or is over.

    torch's functions allocate first and change last: of the gradients of one type all in one call, which takes no
    memory. So a part that ran out of it is done again. Unscaling is a part of its own: `GradScaler` refuses it twice.
    A clip that a script has put in its place stays.
    """
    if "clip_grad_norm_" in vars(accelerator):
        yield
        return

    def clip(parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2) -> torch.Tensor:
        clipped = [parameter for parameter in parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in clipped if parameter.grad is not None]
        kinds = {(g.dtype, g.get_device()): clipped for g in gradients}
        if len(kinds) > 1:
            kinds = {
                kind: [p for p, g in zip(clipped, gradients, strict=True) if (g.dtype, g.get_device()) == kind]
                for kind in kinds
            }
        _unscale(accelerator, len(kinds), record)
        norm = _again(record, lambda: nn.utils.get_total_norm(gradients, norm_type))
        for alike in kinds.values():
            _again(record, lambda alike=alike: nn.utils.clip_grads_with_norm_(alike, max_norm, norm))  # type: ignore[misc]
        return norm

    accelerator.clip_grad_norm_ = clip
    try:
        yield
    finally:
        del accelerator.clip_grad_norm_


def _again(record: Record, work: Callable[[], Any]) -> Any:
    return retried(record, "clipping", work)


def _unscale(accelerator: Any, kinds: int, record: Record) -> None:
    """Takes the loss's scale out of the gradients; does nothing without one.

    Raises:
        OutOfBudget: also where it failed with gradients of several types: some may have been divided.
    """
    if kinds <= 1:
        _again(record, accelerator.unscale_gradients)
        return
    with Watch() as watch:
        accelerator.unscale_gradients()
        return
    raise OutOfBudget(f"unscaling ran out of memory, perhaps half way: again it might divide twice; {watch.fault}")
