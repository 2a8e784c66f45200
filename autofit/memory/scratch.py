"""What kernels take from the allocator for a moment, inside one operation: no dispatcher sees it.

Measured operation by operation on an H100 (torch 2.11, bitsandbytes 0.50.2): allocated before, at the peak inside, and
after. Each entry maps an operation to the sizes, in bytes, of what lives until it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import varlen as _varlen  # noqa: F401  (registers its operations)

aten = torch.ops.aten
Scratch = Callable[[tuple[Any, ...], dict[str, Any]], list[int]]


def _attention_backward(query: torch.Tensor, key: torch.Tensor, length: int) -> tuple[int, int, list[int]]:
    """Bytes of dQ accumulated in float32, of the row sums, and of dK and dV before groups of heads are summed."""
    rows, heads, head = query.shape[0], query.shape[1], query.shape[3]
    grouped = heads != key.shape[1]
    expanded = rows * heads * key.shape[2] * head * query.element_size()
    return rows * heads * length * head * 4, rows * heads * length * 4, [expanded, expanded] if grouped else []


def _cudnn_backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    query, key = args[1], args[2]
    accumulated, sums, expanded = _attention_backward(query, key, query.shape[2])
    return [accumulated + sums + 512 + sum(expanded)]


def _flash_backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    query, key = args[1], args[2]
    length = -(-query.shape[2] // 128) * 128
    accumulated, sums, expanded = _attention_backward(query, key, length)
    head = query.shape[3]
    return [accumulated // head * _rounded(head), sums, *expanded]


def _rounded(head: int) -> int:
    """The head size that flash attention's kernels compute with."""
    return -(-head // 32) * 32 if head <= 192 else 256


def _varlen_backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """As flash attention's, for [tokens, heads, head size]; each sequence counts as 128 tokens more."""
    query, key, sequences = args[1], args[2], args[6].numel() - 1
    tokens, heads, head = query.shape
    each = (tokens + 128 * sequences) * heads * 4
    expanded = heads * key.shape[0] * head * query.element_size()
    return [each, each * _rounded(head), *([expanded, expanded] if heads != key.shape[1] else [])]


def _efficient_backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    query = args[1]
    length = -(-query.shape[2] // 128) * 128
    rows, heads, head = query.shape[0], query.shape[1], query.shape[3]
    accumulated = rows * heads * length * (128 if head > 64 else 64) * 4
    return [rows * heads * query.shape[2] * 4, accumulated if query.element_size() == 2 else 0]


def _softmax_backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    return [args[1].numel() * args[1].element_size()]


def _gemm_4bit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """The dequantized weight, and twice the statistics in float32 where these are quantized too."""
    activations, shape = args[0], args[2]
    weights = shape[0] * shape[1]
    statistics = kwargs.get("absmax_8bit", args[7] if len(args) > 7 else None)
    twice = [] if statistics is None else [statistics.numel() * 4] * 2
    return [*twice, weights * activations.element_size()]


def _int8_quant(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Outliers are looked for in |A|, then zeroed in a copy."""
    rows = args[0]
    threshold = kwargs.get("threshold", args[1] if len(args) > 1 else 0.0)
    return [] if threshold == 0 else [rows.numel() * rows.element_size(), rows.numel()]


def _int8_mixed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """The product in int32, then in float16; and the outlier columns of the weight, dequantized in float32, twice."""
    rows, columns = args[1].shape[0], args[2].shape[0]
    outliers = args[5].numel() if len(args) > 5 and args[5] is not None else 0
    return [rows * columns * 4, rows * columns * 2, 2 * 4 * outliers * columns]


def _sort(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    return [3 * args[0].numel() * args[0].element_size()]


def _grouped_mm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    return [588 * args[2].numel()] if len(args) > 2 and args[2] is not None else []


SCRATCH: dict[Any, Scratch] = {
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    torch.ops.torch_attn._varlen_attn_backward.default: _varlen_backward,
    aten._softmax_backward_data.default: _softmax_backward,
    aten.sort.default: _sort,
    aten._grouped_mm.default: _grouped_mm,
}


def bitsandbytes_scratch() -> dict[Any, Scratch]:
    """The same for bitsandbytes' operations, which exist once it is imported."""
    ops = torch.ops.bitsandbytes
    return {
        ops.gemm_4bit.default: _gemm_4bit,
        ops.int8_vectorwise_quant.default: _int8_quant,
        ops.int8_mixed_scaled_mm.default: _int8_mixed,
    }
