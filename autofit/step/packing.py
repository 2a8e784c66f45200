"""Several sequences in one row, each attending to itself only: attention that is told where each begins."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autofit.step.policy import PACKED_ATTENTION

# Newer releases of torch want to be told that heads may share keys and values.
_GROUPS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")


@dataclass(frozen=True)
class Packing:
    """How sequences lie in a packed row.

    Attributes:
        position_ids: int64 [1, tokens]: each token's place in its sequence.
        starts: int32 [sequences + 1]: where each sequence begins, and the row's end.
        lengths: tokens of each sequence.
    """

    position_ids: torch.Tensor
    starts: torch.Tensor
    lengths: tuple[int, ...]

    def to(self, device: str | torch.device) -> Packing:
        """The same on a device; from pinned host memory this does not wait."""
        ids, starts = (t.to(device, non_blocking=True) for t in (self.position_ids, self.starts))
        return Packing(ids, starts, self.lengths)


# Of the micro-batch that runs. Not a context variable: recomputation runs in autograd's threads.
_running: list[Packing] = []


@contextlib.contextmanager
def packed_as(packing: Packing | None) -> Iterator[None]:
    """While it is open (forward and backward of a micro-batch) attention keeps to these sequences."""
    if packing is None:
        yield
        return
    _running.append(packing)
    try:
        yield
    finally:
        _running.pop()


@contextlib.contextmanager
def not_packed(model: nn.Module, attention: str) -> Iterator[None]:
    """While it is open, a model built for packed rows has the attention (transformers' name) of padded ones."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    packed: list[Any] = [
        config for config in configs.values() if getattr(config, "_attn_implementation", None) == PACKED_ATTENTION
    ]
    try:
        for config in packed:
            config._attn_implementation = attention
        yield
    finally:
        for config in packed:
            config._attn_implementation = PACKED_ATTENTION


def packed_head_size(base: PreTrainedModel) -> int | None:
    """The head size of a base of which all that mixes tokens is causal attention, as `packed_attention` does it.

    None with layers that carry a state or convolve along the row, scores that are capped, biased or have sinks,
    dropout on attention, or head sizes that flash attention does not take.
    """
    config: Any = base.config.get_text_config(decoder=True)
    try:
        return _head_size(config) if _mixes_by_attention_alone(base, config) else None
    except RuntimeError:  # transformers' answer where layers differ
        return None


def _mixes_by_attention_alone(base: PreTrainedModel, config: Any) -> bool:
    layers = getattr(config, "layer_types", None) or ()
    return (
        type(base).__module__.startswith("transformers.")
        and bool(base._supports_attention_backend and base._supports_flash_attn)
        and set(layers) <= _KNOWN_LAYERS
        and getattr(config, "attn_logit_softcapping", None) is None
        and not any(getattr(config, name, 0) for name in _ATTENTION_DROPOUT)
        and not getattr(config, "attention_chunk_size", None)
        and not any(isinstance(module, nn.Conv1d) for module in base.modules())
        and not any(name.endswith("sinks") for name, _ in base.named_parameters())
    )


def _head_size(config: Any) -> int | None:
    """What all heads have, where flash attention takes it."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return None
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return size if getattr(config, "v_head_dim", size) == size and size % 8 == 0 else None


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface, for the sequences of `packed_as`.

    Args:
        query, key, value: [1, heads, tokens, head size]; keys and values may have fewer heads.
        sliding_window: how many tokens back a token sees, itself included.

    Returns:
        [1, tokens, heads, head size], and no weights.

    Raises:
        NotImplementedError: something that would give another result than the model's own attention.
    """
    unknown = {"mask": attention_mask, "dropout": dropout or None, "position_bias": kwargs.get("position_bias")}
    unknown |= {"softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
    found = [name for name, value in unknown.items() if value is not None]
    if found or not _running:
        raise NotImplementedError(f"packed attention with {', '.join(found)}" if found else "no packing is running")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(dtype) for t in (query, key, value))
    if query.device.type == "cpu" or query.dtype is torch.float32:
        return _one_by_one(query, key, value, scaling, sliding_window), None
    packing = _running[-1]
    longest = max(packing.lengths)
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
    out = varlen_attn(
        query,
        key,
        value,
        packing.starts,
        packing.starts,
        longest,
        longest,
        scale=scaling,
        window_size=window,
        **_GROUPS,
    )
    assert isinstance(out, torch.Tensor)
    return out[None], None


def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, sliding_window: int | None
) -> torch.Tensor:
    """What the kernel computes, where there is no such kernel: a CPU, and float32."""
    out = []
    lengths = _running[-1].lengths
    for q, k, v in zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True):
        length = q.shape[2]
        mask = None
        if sliding_window is not None and length > sliding_window:
            causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
            mask = causal.triu(1 - sliding_window)
        grouped = q.shape[1] != k.shape[1]
        out.append(
            F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped)
        )
    return torch.cat(out, dim=2).transpose(1, 2).contiguous()


ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, packed_attention)
