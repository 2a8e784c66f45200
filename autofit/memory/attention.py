"""Which kernel `scaled_dot_product_attention` takes on the target device, and what runs then.

The rules are those of torch 2.11 to 2.13 (ATen/native/transformers/cuda/sdp_utils.cpp), checked on an H100.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from autofit.space.facts import DeviceFacts, has_narrow_flash

aten = torch.ops.aten

HALVES = (torch.float16, torch.bfloat16)
_CPU_FLASH = 1  # torch's SDPBackend.FLASH_ATTENTION


def cuda_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    groups: bool,
    capability: tuple[int, int],
) -> str:
    """ "cudnn", "flash", "efficient" or "math", for [rows, heads, length, head size] inputs.

    `groups` is the caller's `enable_gqa`: that fewer keys than queries are meant.
    """
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return "math"
    head, value_head = query.shape[-1], value.shape[-1]
    grouped = query.shape[1] != key.shape[1] or key.shape[1] != value.shape[1]
    last_strides = [t.stride(-1) == 1 or t.shape[-1] == 1 for t in (query, key, value)]
    halves = query.dtype == key.dtype == value.dtype and query.dtype in HALVES
    halves = halves and (query.dtype is torch.float16 or capability >= (8, 0))
    if grouped and not groups:
        return "math"  # heads are broadcast, which no fused kernel does
    if 0 in (query.shape[2], key.shape[2]) or not all(last_strides):
        return "math"
    if capability[0] in (9, 10) and halves and _cudnn_fits(head, value_head, key.shape[2], dropout, query):
        return "cudnn"
    square = not causal or query.shape[2] == key.shape[2]
    if halves and capability >= (8, 0) and mask is None and square and head == value_head == key.shape[-1] <= 256:
        widest = 192 if has_narrow_flash(capability) and query.requires_grad else 256
        if head <= widest or (dropout == 0 and head > 224):
            return "flash"
    aligned = 8 if query.dtype in HALVES and capability[0] >= 7 else 4 if capability[0] >= 8 else 1
    efficient = query.dtype in ((torch.float16, torch.float32) if capability[0] < 8 else (*HALVES, torch.float32))
    if efficient and not grouped and head % aligned == 0 and value_head % aligned == 0:
        return "efficient"
    return "math"


def rules_of(capability: tuple[int, int]) -> Hashable:
    """What of a compute capability decides: for two with equal rules `cuda_kernel` says the same."""
    major = capability[0]
    return min(major, 7), major >= 8, major in (9, 10), has_narrow_flash(capability)


def _cudnn_fits(head: int, value_head: int, keys: int, dropout: float, query: torch.Tensor) -> bool:
    sizes = head % 8 == 0 and value_head % 8 == 0 and max(head, value_head) <= 256
    return sizes and keys > 1 and dropout * 16 == math.floor(dropout * 16) and query.shape[0] <= 65535


def attend(
    device: DeviceFacts,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
) -> torch.Tensor:
    """The operations that the device's kernel consists of, on meta tensors."""
    if device.type == "cpu":
        return _on_cpu(query, key, value, mask, dropout, causal, scale, grouped)
    kernel = cuda_kernel(query, key, value, mask, dropout, causal, grouped, device.compute_capability or (8, 0))
    if kernel == "flash":
        head = query.shape[-1]
        scale = scale if scale is not None else 1 / math.sqrt(head)
        padded = [F.pad(t, (0, -head % 8)) if head % 8 else t for t in (query, key, value)]
        out: torch.Tensor = aten._scaled_dot_product_flash_attention(*padded, dropout, causal, False, scale=scale)[0]
        return out[..., :head] if head % 8 else out
    additive = _additive(mask, query.dtype)
    with_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if kernel == "cudnn":
        result = aten._scaled_dot_product_cudnn_attention(
            query, key, value, additive, with_grad, dropout, causal, False, scale=scale
        )
        return result[0]
    if kernel == "efficient":
        if additive is not None:
            additive = _aligned(additive, query, key)
        result = aten._scaled_dot_product_efficient_attention(
            query, key, value, additive, with_grad, dropout, causal, scale=scale
        )
        return result[0]
    return aten._scaled_dot_product_attention_math(
        query, key, value, additive, dropout, causal, None, scale=scale, enable_gqa=grouped
    )[0]


def _on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
) -> torch.Tensor:
    """The CPU is asked itself, with empty tensors of the same sizes, strides and gradients: it reads none of them."""
    with _disable_current_modes():
        choice = torch._fused_sdp_choice(
            _stand_in(query),
            _stand_in(key),
            _stand_in(value),
            attn_mask=None if mask is None else _stand_in(mask),
            dropout_p=dropout,
            is_causal=causal,
            scale=scale,
            enable_gqa=grouped,
        )
    additive = _additive(mask, query.dtype)
    if choice == _CPU_FLASH:
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout, causal, attn_mask=additive, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(
        query, key, value, additive, dropout, causal, None, scale=scale, enable_gqa=grouped
    )[0]


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    reach = 1 + sum((size - 1) * stride for size, stride in pairs) if tensor.numel() else 0
    storage = torch.UntypedStorage(reach * tensor.element_size())
    made = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())
    return made.requires_grad_(tensor.requires_grad) if tensor.dtype.is_floating_point else made


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A boolean mask as the numbers that are added to the scores."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    zero = torch.scalar_tensor(0.0, dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.scalar_tensor(-math.inf, dtype=dtype, device=mask.device))


def _aligned(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The efficient kernel wants rows of a multiple of 16 elements; a mask that has not is padded and sliced."""
    if mask.shape[-1] % 16:
        length = mask.shape[-1]
        mask = F.pad(mask, (0, -length % 16))[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
