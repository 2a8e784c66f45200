"""TRL's SFTTrainer and transformers' Trainer as they come: what their constructors, loss and loop add to a step.

Each recipe is held to the real class by tests/step/test_recipes.py: the same bytes live at the peak. The batch is of
whole rows: every sequence has the same length, the attention mask is all ones, and the labels are the tokens.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from transformers import masking_utils

from autofit.step.fused_head import FusedOutputs, fused_outputs
from autofit.step.policy import StepPolicy

MAX_GRAD_NORM = 1.0  # TrainingArguments' default


@dataclass(frozen=True)
class StockBatch:
    """What the stock collators make of whole rows: int64 [rows, length] each, on the device."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


def stock_batch(input_ids: torch.Tensor, device: str) -> StockBatch:
    """The batch of these rows (int64 [rows, length]) on the device."""
    ids = input_ids.to(device, non_blocking=True)
    return StockBatch(ids, torch.ones_like(ids), ids.clone())


def trained_items(batches: list[StockBatch]) -> torch.Tensor:
    """The trained tokens of all batches as the Trainer counts them: one float on the device."""
    total: Any = sum(batch.labels[..., 1:].ne(-100).sum() for batch in batches)
    items: torch.Tensor = total / 1
    return items


@dataclass(frozen=True)
class Recipe:
    """A stock trainer's loss of one batch.

    Attributes:
        loss: (peft model, batch, items or None, micro-batches, policy) → the loss that the loop goes on with. Items are
            the trained tokens of the global batch, micro-batches their number in it.
        prepare: what the constructor changes in the built model.
    """

    loss: Callable[[Any, StockBatch, torch.Tensor | None, int, StepPolicy], torch.Tensor]
    prepare: Callable[[Any], None]


def accepts_items(base: Any) -> bool:
    """Whether the Trainer divides this model's loss by the trained tokens of the global batch, not of the batch."""
    if hasattr(base, "accepts_loss_kwargs"):
        return bool(base.accepts_loss_kwargs)
    parameters = inspect.signature(base.forward).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def trainer_loss(
    model: Any, batch: StockBatch, items: torch.Tensor | None, micro_batches: int, policy: StepPolicy
) -> torch.Tensor:
    """transformers' Trainer: the model's own loss, from all logits at once, which go when it is known."""
    del micro_batches
    extra = {} if items is None else {"num_items_in_batch": items}
    forward = _mixed_precision(model.__call__, policy)
    outputs = forward(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, **extra)
    loss: torch.Tensor = outputs["loss"]
    if items is not None:
        loss *= 1  # the processes
    return loss


def sft_loss(
    model: Any, batch: StockBatch, items: torch.Tensor | None, micro_batches: int, policy: StepPolicy
) -> torch.Tensor:
    """TRL's SFTTrainer: the fused output layer, and the sums of its metrics."""
    base = model.get_base_model()
    router_logits = bool(getattr(base.config.get_text_config(), "output_router_logits", False))

    def forward() -> dict[str, Any]:
        outputs = fused_outputs(
            base, batch.input_ids, batch.attention_mask, batch.labels, router_logits, policy.targets_gpu
        )
        return outputs.__dict__

    outputs = FusedOutputs(**_mixed_precision(forward, policy)())
    per_token = -outputs.log_probs
    count = outputs.label_mask.sum() if items is None else items
    loss = per_token.sum() / count.clamp(min=1)
    weighted = None
    if outputs.aux_loss is not None:
        weighted = base.config.get_text_config().router_aux_loss_coef * outputs.aux_loss
    if items is not None:
        loss = loss * 1  # the processes
    if weighted is not None:
        loss = loss + weighted / (1 if items is None else micro_batches)
    # The metrics: their values go to the host, which reads nothing from a tensor without values.
    metrics = [x.sum().sum() for x in (outputs.label_mask, outputs.entropy.detach(), outputs.is_top1)]
    del metrics
    return loss


def prepare_sft(model: Any) -> None:
    """What SFTTrainer's constructor decides about a mixture of experts: its auxiliary loss is on where it has one."""
    config = model.get_base_model().config.get_text_config()
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = getattr(config, "router_aux_loss_coef", 0.0) != 0.0


def prepare_trainer(model: Any) -> None:
    """transformers' Trainer takes the model as it is."""


RECIPES = {"sft": Recipe(sft_loss, prepare_sft), "trainer": Recipe(trainer_loss, prepare_trainer)}


def _mixed_precision(forward: Callable[..., Any], policy: StepPolicy) -> Callable[..., Any]:
    """As accelerate prepares a model: autocast within, outputs in float32; nothing without mixed precision."""
    if policy.autocast_dtype is None:
        return forward
    autocast = torch.autocast(policy.device, dtype=getattr(torch, policy.autocast_dtype))
    prepared: Callable[..., Any] = convert_outputs_to_fp32(autocast(forward))
    return prepared


@contextlib.contextmanager
def masks_are_full() -> Iterator[None]:
    """Answers transformers' question whether nothing is masked where the mask has no values."""
    stock = masking_utils.fast_all

    def fast_all(tensor: Any) -> Any:
        return True if tensor.is_meta else stock(tensor)

    masking_utils.fast_all = fast_all
    try:
        yield
    finally:
        masking_utils.fast_all = stock
