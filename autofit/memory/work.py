"""What an operation computes and moves: the figures that a roofline needs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.attention import varlen as _varlen  # noqa: F401  (registers its operations)

aten = torch.ops.aten

_VIEWS = frozenset(
    (
        aten.view.default,
        aten._unsafe_view.default,
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.expand.default,
        aten.detach.default,
        aten.alias.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.slice.Tensor,
        aten.select.int,
        aten.split.Tensor,
        aten.as_strided.default,
        aten.unbind.int,
        aten.lift_fresh.default,
    )
)


def operation_work(func: Any, args: tuple[Any, ...], out: Any) -> tuple[float, float]:
    """(floating-point operations in matrix products, bytes read and written) of one operation; views move nothing."""
    if func in _VIEWS:
        return 0.0, 0.0
    inputs = [a for a in args if isinstance(a, torch.Tensor)]
    moved = float(sum(t.numel() * t.element_size() for t in inputs))
    for result in out if isinstance(out, (tuple, list)) else (out,):
        if isinstance(result, torch.Tensor):
            moved += result.numel() * result.element_size()
    product = _PRODUCTS.get(func)
    if product is not None:
        return product(args), moved
    if func.namespace == "bitsandbytes":
        return _quantized(func, args, out), moved
    return 0.0, moved


def _mm(args: Any) -> float:
    return 2.0 * args[0].numel() * args[1].shape[-1]


def _addmm(args: Any) -> float:
    return 2.0 * args[1].numel() * args[2].shape[-1]


def _attention(forward: float, first: int) -> Any:
    """Half of the scores are masked away where attention is causal; a backward pass makes five products of two."""

    def flops(args: Any) -> float:
        query, key, value = args[first : first + 3]
        scores = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
        return forward * scores * (query.shape[3] + value.shape[3])

    return flops


def _varlen_attention(forward: float, first: int) -> Any:
    """As above, for [tokens, heads, head size], as if sequences were half as long as the longest."""

    def flops(args: Any) -> float:
        tokens, heads, head = args[first].shape
        longest = next(arg for arg in args if type(arg) is int)
        return forward * heads * tokens * longest * head

    return flops


def _convolution(args: Any) -> float:
    return 2.0 * args[0].numel() * math.prod(args[1].shape[1:]) * args[1].shape[0] / max(args[0].shape[1], 1)


def _quantized(func: Any, args: Any, out: Any) -> float:
    name = func._schema.name
    if name.endswith("gemm_4bit"):
        return 2.0 * args[0].numel() * args[2][0]
    if name.endswith(("int8_mixed_scaled_mm", "int8_scaled_mm", "int8_linear_matmul")):
        weights = [a for a in args if isinstance(a, torch.Tensor) and a.dtype is torch.int8]
        return 2.0 * weights[0].numel() * weights[1].shape[0]
    return 0.0


_PRODUCTS: dict[Any, Any] = {
    aten.mm.default: _mm,
    aten.bmm.default: _mm,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.convolution.default: _convolution,
    torch.ops.torch_attn._varlen_attn.default: _varlen_attention(1.0, 0),
    torch.ops.torch_attn._varlen_attn_backward.default: _varlen_attention(2.5, 1),
    aten._scaled_dot_product_flash_attention.default: _attention(1.0, 0),
    aten._scaled_dot_product_cudnn_attention.default: _attention(1.0, 0),
    aten._scaled_dot_product_efficient_attention.default: _attention(1.0, 0),
    aten._scaled_dot_product_flash_attention_backward.default: _attention(2.5, 1),
    aten._scaled_dot_product_cudnn_attention_backward.default: _attention(2.5, 1),
    aten._scaled_dot_product_efficient_attention_backward.default: _attention(2.5, 1),
}
