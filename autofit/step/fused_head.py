"""TRL's fused output layer (SFTTrainer's loss), so that it also runs where only shapes are known.

TRL's own code chooses the trained positions by a mask on a GPU, which asks the mask's values for the shape. A recipe's
rows are trained whole, so the number of positions is known without asking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from autofit.step.loss import logit_transform

VOCABULARY_CHUNK = 32768  # TRL's tiles are this wide whatever the vocabulary
OUTPUTS = ("entropy", "is_top1")


@dataclass
class FusedOutputs:
    """Per predicted token, [rows, length − 1]; they live until the loss is computed, like TRL's.

    Attributes:
        loss: TRL computes one itself and SFTTrainer does not use it.
        log_probs: float32, of each next token.
        entropy: float32, of the distribution of the next token.
        is_top1: bool, whether the label is the likeliest token.
        label_mask: bool, whether the label is trained.
        aux_loss: what a mixture of experts adds for the balance of its experts.
    """

    loss: torch.Tensor
    log_probs: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor
    label_mask: torch.Tensor
    aux_loss: torch.Tensor | None


def fused_outputs(
    base: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    router_logits: bool,
    on_gpu: bool,
) -> FusedOutputs:
    """The backbone and TRL's tiles over its last states, for whole rows of which every token is trained.

    `input_ids`, `attention_mask` and `labels` are int64 [rows, length]; `base` is the causal language model.
    """
    extra = {"output_router_logits": True} if router_logits else {}
    backbone = base.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extra)
    hidden = backbone.last_hidden_state[:, :-1]
    labels = labels[:, 1:]
    head = base.get_output_embeddings()
    mask = labels != -100
    scale, softcap = logit_transform(base.config)
    trained = mask.numel()
    scored = ChunkedLogProbFunction.apply(
        _Chosen.apply(hidden, mask, trained) if on_gpu else hidden.reshape(-1, hidden.size(-1)),
        head.weight,
        getattr(head, "bias", None),
        _chosen(labels, mask, trained) if on_gpu else labels.clamp(min=0).reshape(-1),
        1.0,
        VOCABULARY_CHUNK,
        softcap,
        scale,
        OUTPUTS,
    )
    placed: Any = [None if x is None else _placed(x, mask, on_gpu) for x in scored]
    log_probs, entropy, _, _, is_top1 = placed
    del scored, placed
    loss = -log_probs.sum() / mask.sum().clamp(min=1)
    aux_loss = _aux_loss(base, backbone.router_logits, attention_mask) if router_logits else None
    if aux_loss is not None:
        loss = loss + base.config.get_text_config().router_aux_loss_coef * aux_loss
    return FusedOutputs(loss, log_probs, entropy, is_top1, mask, aux_loss)


def _aux_loss(base: Any, router_logits: Any, attention_mask: torch.Tensor) -> Any:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = base.config.get_text_config()
    loss: Any = load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, attention_mask)
    return loss


def _placed(scores: torch.Tensor, mask: torch.Tensor, on_gpu: bool) -> torch.Tensor:
    if on_gpu:
        placed: torch.Tensor = _Placed.apply(scores, mask)
        return placed
    return scores.view(mask.shape).masked_fill(~mask, 0)


def _coordinates(mask: torch.Tensor, trained: int) -> tuple[torch.Tensor, ...]:
    """Where the mask is true, as indexing by it finds out: int64 [trained] for each dimension."""
    found = mask.new_empty((trained, mask.dim()), dtype=torch.int64) if mask.is_meta else mask.nonzero()
    return found.unbind(1)


def _chosen(tensor: torch.Tensor, mask: torch.Tensor, trained: int) -> torch.Tensor:
    return tensor[_coordinates(mask, trained)]


class _Chosen(torch.autograd.Function):
    """`hidden[mask]`: the states [trained, hidden size] at the trained positions; keeps the mask for backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, mask: torch.Tensor, trained: int) -> torch.Tensor:
        ctx.save_for_backward(mask)
        ctx.shape = hidden.shape
        return _chosen(hidden, mask, trained)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        (gradient,) = gradients
        whole = gradient.new_zeros(ctx.shape)
        return whole.index_put_(_coordinates(mask, gradient.shape[0]), gradient, accumulate=True), None, None


class _Placed(torch.autograd.Function):
    """`zeros.masked_scatter(mask, scores)`: scores [trained] at their places in [rows, length − 1]."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(mask)
        if not scores.is_floating_point():
            placed = scores.new_zeros(mask.shape).masked_scatter(mask, scores)
            ctx.mark_non_differentiable(placed)
            return placed
        return scores.new_zeros(mask.shape).masked_scatter(mask, scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return _chosen(gradients[0], mask, mask.numel()), None
