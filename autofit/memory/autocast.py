"""CUDA's autocast for tensors that are not on CUDA: which operations cast their inputs, and to what.

The lists are those of torch's ATen/autocast_mode.h; a test holds them to the installed header.
"""

from __future__ import annotations

from typing import Any

import torch

# To the autocast type.
LOWER_PRECISION = [
    "_convolution.deprecated",
    "_convolution",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_tbc",
    "conv_transpose1d",
    "conv_transpose2d.input",
    "conv_transpose3d.input",
    "convolution",
    "prelu",
    "addmm",
    "addmv",
    "addr",
    "matmul",
    "einsum",
    "mm",
    "mv",
    "linalg_vecdot",
    "linear",
    "addbmm",
    "baddbmm",
    "bmm",
    "chain_matmul",
    "linalg_multi_dot",
    "_thnn_fused_lstm_cell",
    "_thnn_fused_gru_cell",
    "lstm_cell",
    "gru_cell",
    "rnn_tanh_cell",
    "rnn_relu_cell",
    "_scaled_dot_product_flash_attention",
    "scaled_dot_product_attention",
]
# To float32.
FLOAT32 = [
    "acos",
    "asin",
    "cosh",
    "erfinv",
    "exp",
    "expm1",
    "log",
    "log10",
    "log2",
    "log1p",
    "reciprocal",
    "rsqrt",
    "sinh",
    "tan",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "softplus",
    "layer_norm",
    "native_layer_norm",
    "rms_norm",
    "group_norm",
    "frobenius_norm.dim",
    "nuclear_norm",
    "nuclear_norm.dim",
    "cosine_similarity",
    "poisson_nll_loss",
    "cosine_embedding_loss",
    "nll_loss",
    "nll_loss2d",
    "hinge_embedding_loss",
    "kl_div",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "mse_loss",
    "margin_ranking_loss",
    "multilabel_margin_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
    "multi_margin_loss",
    "binary_cross_entropy_with_logits",
    "dist",
    "pdist",
    "cdist",
    "renorm",
    "logsumexp",
    "upsample_nearest1d",
    "_upsample_nearest_exact1d",
    "upsample_nearest2d",
    "_upsample_nearest_exact2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "_upsample_bilinear2d_aa",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
    "_upsample_bicubic2d_aa",
]
# Told to compute their result in float32, unless they are told a type already.
FLOAT32_RESULT = [
    "prod",
    "prod.dim_int",
    "softmax.int",
    "log_softmax.int",
    "cumprod",
    "cumsum",
    "linalg_vector_norm",
    "linalg_matrix_norm",
    "linalg_matrix_norm.str_ord",
    "sum",
    "sum.dim_IntList",
]
# To the widest type among their inputs.
WIDEST = [
    "addcdiv",
    "addcmul",
    "atan2",
    "bilinear",
    "cross",
    "dot",
    "vdot",
    "grid_sampler",
    "index_put",
    "tensordot",
    "scatter_add",
]


def overload(name: str) -> Any:
    """`mm` or `pow.Scalar` as the operation it names; None where this torch has no such one."""
    packet, _, variant = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet, None), variant or "default", None)


class WeightCache:
    """Casts of leaf parameters that autocast keeps until its outermost context ends."""

    def __init__(self) -> None:
        self._casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def clear(self) -> None:
        self._casts.clear()

    def cast(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The tensor in `dtype`, cast as autocast casts it: recorded by autograd, kept where it is a float32 leaf."""
        if tensor.dtype is dtype or not _eligible(tensor):
            return tensor
        keep = (
            tensor.requires_grad
            and tensor.is_leaf
            and tensor.dtype is torch.float32
            and dtype is torch.get_autocast_dtype("cuda")
            and torch.is_autocast_cache_enabled()
            and not tensor._is_view()
        )
        if not keep:
            return tensor.to(dtype)
        known = self._casts.get(id(tensor))
        if known is None:
            known = self._casts[id(tensor)] = (tensor, tensor.to(dtype))
        return known[1]


def dtype_position(operation: Any) -> int | None:
    """Where an operation's `dtype` stands among its positional arguments."""
    names = [a.name for a in operation._schema.arguments if not a.kwarg_only]
    return names.index("dtype") if "dtype" in names else None


def autocast_arguments(
    kind: str, args: Any, kwargs: Any, cache: WeightCache, position: int | None = None
) -> tuple[Any, Any]:
    """An operation's arguments as CUDA's autocast would hand them on.

    `kind` is one of the lists above, by name; `position` where a FLOAT32_RESULT operation takes its `dtype`.
    """
    if kind == "FLOAT32_RESULT":
        if _eligible(args[0]):
            if position is not None and len(args) > position:
                args = (*args[:position], args[position] or torch.float32, *args[position + 1 :])
            else:
                kwargs = {**kwargs, "dtype": kwargs.get("dtype") or torch.float32}
        return args, kwargs
    if kind == "LOWER_PRECISION":
        dtype = torch.get_autocast_dtype("cuda")
    elif kind == "FLOAT32":
        dtype = torch.float32
    else:
        dtype = _widest((args, kwargs))
    kwargs = {key: _cast(value, dtype, cache) for key, value in kwargs.items()}
    # The last argument first, as the compiled code evaluates them.
    cast = [_cast(value, dtype, cache) for value in reversed(args)]
    return tuple(reversed(cast)), kwargs


def _eligible(tensor: torch.Tensor) -> bool:
    """Values that are kept on the host beside meta tensors are no part of the step."""
    return tensor.device.type == "meta" and tensor.is_floating_point() and tensor.dtype is not torch.float64


def _cast(value: Any, dtype: torch.dtype, cache: WeightCache) -> Any:
    if isinstance(value, torch.Tensor):
        return cache.cast(value, dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, dtype, cache) for item in value)
    return value


def _widest(tree: Any) -> torch.dtype:
    """float32 where a floating input is float32, else the autocast type."""
    if isinstance(tree, torch.Tensor):
        return tree.dtype if tree.dtype is torch.float32 else torch.get_autocast_dtype("cuda")
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    found = [_widest(value) for value in values]
    return torch.float32 if torch.float32 in found else torch.get_autocast_dtype("cuda")
