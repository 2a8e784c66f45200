"""Kernels that no meta tensor can run, and what stands in for each: what it returns, keeps, and takes for a moment.

| kernel | stands in | kept for backward | for a moment |
| --- | --- | --- | --- |
| TRL's Triton folds of a tile of logits | nothing: they write in place | – | – |
| torch's fused AdamW | nothing: it writes in place | – | – |
| TRL's product into a float32 sum | nothing: cuBLAS adds in place | – | – |
| bitsandbytes' 4-bit numbers | a copy of those made once | – | – |
| bitsandbytes' managed memory | a tensor that no ledger counts | paged states, listed apart | – |
| bitsandbytes' int8 quantization | results of its shapes, `outlier_columns` of outliers | – | scratch.py |
| bitsandbytes' int8 product | results of its shapes | the outlier columns | scratch.py |
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim import adam, optimizer
from torch.utils._python_dispatch import _disable_current_modes
from trl.kernels import chunked_logprob

from autofit.memory.patches import patched
from autofit.space.facts import DeviceFacts


@contextlib.contextmanager
def stand_ins(device: DeviceFacts, paged: dict[int, int], one_tile: bool) -> Iterator[None]:
    """While it is open, the table above holds. Bytes of paged optimizer states are put in `paged`, by storage.

    With `one_tile` TRL's tile of logits has all tokens at once: it then grows with them, and its loop runs once.
    """
    with contextlib.ExitStack() as patches:
        patches.enter_context(patched(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta", "cpu"]))
        patches.enter_context(patched(adam, "_device_dtype_check_for_fused", _nothing))
        for owner, name, replacement in (*_bitsandbytes(paged), *(_trl(one_tile) if device.type == "cuda" else ())):
            patches.enter_context(patched(owner, name, replacement))
        yield


def operation_stand_ins(outlier_columns: Callable[[torch.Tensor], int]) -> dict[Any, Callable[..., Any]]:
    """Operation → what it returns on meta tensors; `outlier_columns` says how many columns of an input have some."""

    def quantize(rows: torch.Tensor, threshold: float = 0.0) -> Any:
        statistics = torch.empty(rows.numel() // rows.shape[-1], dtype=torch.float32, device=rows.device)
        quantized = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
        if threshold == 0.0:
            return quantized, statistics, None
        return quantized, statistics, torch.empty(outlier_columns(rows), dtype=torch.int64, device=rows.device)

    def product(
        rows: torch.Tensor, quantized: torch.Tensor, weight: torch.Tensor, *statistics: Any, **more: Any
    ) -> Any:
        out = torch.empty((*quantized.shape[:-1], weight.shape[0]), dtype=rows.dtype, device=rows.device)
        columns = statistics[2] if len(statistics) > 2 else more.get("outlier_cols")
        count = 0 if columns is None else columns.numel()
        return out, torch.empty((rows.shape[0] if count else 0, count), dtype=rows.dtype, device=rows.device)

    ops = torch.ops.bitsandbytes
    return {
        torch.ops.aten._fused_adamw_.default: _nothing,
        ops.int8_vectorwise_quant.default: quantize,
        ops.int8_mixed_scaled_mm.default: product,
    }


def _bitsandbytes(sizes: dict[int, int]) -> list[tuple[Any, str, Any]]:
    from bitsandbytes import functional

    def paged(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> torch.Tensor:
        with _disable_current_modes():
            state = torch.empty(shape, dtype=dtype, device="meta")
        sizes[state.untyped_storage()._cdata] = state.nbytes
        return state

    # bitsandbytes makes this map on the first device that asks and keeps it for all: not on ours.
    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    genuine = functional.get_4bit_type

    def get_4bit_type(typename: str, device: Any = None, blocksize: int = 64) -> torch.Tensor:
        return _numbers_of_4_bits(genuine, typename, blocksize).to(device)

    return [
        (functional, "get_4bit_type", get_4bit_type),
        (functional, "get_paged", paged),
        (functional, "fill", _nothing),
        (functional, "prefetch_tensor", _nothing),
    ]


@functools.cache
def _numbers_of_4_bits(genuine: Callable[..., torch.Tensor], typename: str, blocksize: int) -> torch.Tensor:
    """The numbers that 4 bits stand for, on the CPU: bitsandbytes computes the same ones anew for every weight."""
    with _disable_current_modes():
        return genuine(typename, device="cpu", blocksize=blocksize)


def _trl(one_tile: bool) -> list[tuple[Any, str, Any]]:
    launched = _Launched()
    pieces: list[tuple[Any, str, Any]] = [
        (chunked_logprob, "_use_triton", lambda device: True),
        (chunked_logprob, "_forward_kernel", launched),
        (chunked_logprob, "_backward_kernel", launched),
        (chunked_logprob, "_addmm_fp32", _nothing),
        *([(chunked_logprob, "TOKEN_CHUNK_SIZE", sys.maxsize)] if one_tile else []),
    ]
    if not hasattr(chunked_logprob, "triton"):
        chunked_logprob.triton = SimpleNamespace(cdiv=lambda a, b: -(-a // b))
    return pieces


class _Launched:
    """A Triton kernel that does nothing: `kernel[grid](…)`."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Takes no memory."""
