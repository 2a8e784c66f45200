"""One optimizer step of several ranks: each gets the gradients of its own share, then all get their mean.

What DistributedDataParallel does within the forward and backward passes (buffers are the first rank's, gradients are
reduced) is done before and after them, so that a rank can do its passes again without the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from autofit.errors import UsageError
from autofit.training.recovery.faults import retried
from autofit.training.recovery.figures import agree_with_figures, local_figures


def items_of_all(trainer: Any, count: Callable[[], Any]) -> Any:
    """What `count` counts on this rank, summed over all; it may be done again, and gathers nothing itself."""
    trainer.accelerator.gather = lambda value: value
    try:
        items = count()
    finally:
        del trainer.accelerator.gather
    votes = trainer._ranks.agree("counting the step's tokens", items=None if items is None else int(items))
    return None if items is None else items.fill_(sum(vote["items"] or 0 for vote in votes))


def share_buffers(trainer: Any) -> None:
    """Gives all ranks the first one's buffers, as the wrapper does with a step's first forward pass.

    All have just agreed on something or do so here: nobody waits in the library for one that has left.
    """
    wrapper = _wrapper(trainer.model_wrapped)
    trainer._ranks.agree("a step's begin")
    for buffer in _buffers(wrapper):
        dist.broadcast(_dense(buffer), 0, group=wrapper.process_group)


def run_together(
    trainer: Any, model: nn.Module, run: Callable[[nn.Module], list[torch.Tensor]], micro_batches: int
) -> list[torch.Tensor]:
    """The losses of this rank's share; the gradients are then the mean over all ranks.

    The sum is taken tensor by tensor and in place, which needs no memory: nothing is left to fail once all have agreed.
    Of two ranks it is the wrapper's to the bit, of more to rounding, for the order of the terms is the library's.

    Args:
        run: gets the gradients of this rank's share from the model within the wrapper, in however many attempts.

    Raises:
        OutOfBudget: a rank's share does not fit.
        AutofitError: a rank is gone.
    """
    wrapper = _wrapper(model)
    with local_figures(trainer):
        losses = run(wrapper.module)
    moving = _parameters(wrapper)
    used = [parameter.grad is not None for parameter in moving]
    retried(trainer.recovery, "reduction", lambda: _fill(moving))
    gradients = [_dense(parameter.grad) for parameter in moving if parameter.grad is not None]
    told = sum(1 << place for place, one in enumerate(used) if one)
    votes = agree_with_figures(trainer, "the gradients", micro_batches, used=f"{told:x}")
    by_any = 0
    for vote in votes:
        by_any |= int(vote["used"], 16)
    for place, parameter in enumerate(moving):
        if not by_any >> place & 1:
            parameter.grad = None  # as the wrapper leaves what no rank has used
    _reduce([gradient for place, gradient in enumerate(gradients) if by_any >> place & 1], wrapper)
    return losses


def _reduce(gradients: Sequence[torch.Tensor], wrapper: DistributedDataParallel) -> None:
    share = 1.0 / dist.get_world_size(wrapper.process_group)
    works = []
    for gradient in gradients:
        gradient.mul_(share)  # before the sum, as the wrapper does
        works.append(dist.all_reduce(gradient, group=wrapper.process_group, async_op=True))
    for work in works:
        work.wait()


def _wrapper(model: nn.Module) -> DistributedDataParallel:
    if not isinstance(model, DistributedDataParallel):
        raise UsageError(f"several processes train a {type(model).__name__}: recovery covers DistributedDataParallel")
    if model._comm_hooks or hasattr(model, "buffer_hook") or model.mixed_precision is not None:
        raise UsageError("recovery does not cover hooks or mixed precision of DistributedDataParallel: leave them away")
    return model


def _parameters(wrapper: DistributedDataParallel) -> list[nn.Parameter]:
    """Those that the wrapper reduces."""
    ignored = wrapper.parameters_to_ignore
    return [p for name, p in wrapper.module.named_parameters() if p.requires_grad and name not in ignored]


def _buffers(wrapper: DistributedDataParallel) -> Iterator[torch.Tensor]:
    """Those that the wrapper gives all ranks at the first forward pass of a step."""
    if wrapper.broadcast_buffers:
        ignored = wrapper.parameters_to_ignore
        yield from (buffer for name, buffer in wrapper.module.named_buffers() if name not in ignored)


def _fill(parameters: Sequence[nn.Parameter]) -> None:
    """Zeros where this rank has no gradient, for another may have one; before it is agreed on, as it needs memory."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory with the dimensions in its order, as collectives want it.

    Raises:
        UsageError: it is sparse, or has gaps.
    """
    if tensor.layout is torch.strided:
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        dense = tensor.detach().permute(order)
        if dense.is_contiguous():
            return dense
    raise UsageError(f"several processes: recovery does not cover sparse tensors and views ({tuple(tensor.shape)})")
