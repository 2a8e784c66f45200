"""What an integer made from unknown values is taken for: an even routing, an order that changes nothing, no NaN.

With `fill` the contrary is assumed: masks are true, and every row is routed alike. Where both give the same bytes,
nothing depends on the guess.
"""

from __future__ import annotations

import math
from typing import Any

import torch

_ORDERS = ("sort", "argsort", "msort")
_PICKS = ("topk", "kthvalue", "mode", "median", "multinomial")
_EXTREMES = ("max", "min", "argmax", "argmin", "cummax", "cummin")
_HARMLESS = ("isinf", "isnan", "isfinite")
# Their result is a view or a copy of integers that are themselves unknown.
_MOVES = frozenset(
    [
        "view",
        "unsqueeze",
        "squeeze",
        "expand",
        "permute",
        "transpose",
        "t",
        "slice",
        "select",
        "reshape",
        "_unsafe_view",
        "as_strided",
        "split",
        "unbind",
        "chunk",
        "_to_copy",
        "clone",
        "copy_",
    ]
)


def index_guess(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor, fill: bool
) -> tuple[torch.Tensor | None, str]:
    """Values for an integer result of operation `name`, and what was guessed ("" where nothing depends on it).

    None where nothing should be assumed (a view of integers that are unknown themselves).
    """
    if name in _MOVES:
        return None, ""
    source = next((a for a in args if isinstance(a, torch.Tensor)), None)
    if name in _PICKS and source is not None and out.dtype is torch.int64:
        dim = kwargs.get("dim", args[2] if len(args) > 2 and type(args[2]) is int else -1)
        if fill:
            return _identity_order(out, dim), f"routing of all rows alike by {name}"
        return even_routing(tuple(out.shape), source.shape[dim], dim), f"even routing by {name}"
    if name in _ORDERS and out.dtype is torch.int64:
        dim = next((a for a in args[1:] if type(a) is int), kwargs.get("dim", -1))
        return _identity_order(out, dim), f"identity order by {name}"
    if name in _EXTREMES and out.dtype is torch.int64 and source is not None:
        dim = next((a for a in args[1:] if type(a) is int), None)
        if out.dim() and dim is not None:
            return (torch.arange(out.numel()) % source.shape[dim]).reshape(out.shape), f"even routing by {name}"
        return torch.zeros(out.shape, dtype=out.dtype), f"first index by {name}"
    truth = name == "isfinite" or (fill and out.dtype is torch.bool and name not in _HARMLESS)
    what = "" if name in _HARMLESS else f"{'true' if truth else 'zero'} by {name}"
    return torch.full(out.shape, truth, dtype=out.dtype), what


def even_routing(shape: tuple[int, ...], choices: int, dim: int = -1) -> torch.Tensor:
    """int64 indices of this shape, below `choices` along `dim`, as a router that spreads rows evenly gives them."""
    if not shape:
        return torch.zeros((), dtype=torch.int64)
    picks = shape[dim]
    rows = max(1, math.prod(shape) // max(picks, 1))
    chosen = (torch.arange(rows).unsqueeze(1) * picks + torch.arange(picks)) % max(choices, 1)
    moved = [*shape]
    moved.append(moved.pop(dim))
    return chosen.reshape(moved).movedim(-1, dim).contiguous()


def _identity_order(out: torch.Tensor, dim: int) -> torch.Tensor:
    if out.dim() == 0:
        return torch.zeros((), dtype=out.dtype)
    lengths = [1] * out.dim()
    lengths[dim] = -1
    return torch.arange(out.shape[dim]).reshape(lengths).expand(out.shape).contiguous()
