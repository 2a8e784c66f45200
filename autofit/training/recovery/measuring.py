"""Finding out what kind of loss a trainer has, on the model as it trains, less what is drawn at random."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from autofit.training.recovery.attributes import is_own
from autofit.training.recovery.cutting import MOST_ROWS, LossKind, measure_kind
from autofit.training.recovery.rows import take

_DROPOUTS = {
    F.dropout,
    F.alpha_dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.alpha_dropout,
    torch.feature_dropout,
    torch.feature_alpha_dropout,
}
# Of scaled_dot_product_attention(query, key, value, attn_mask, dropout_p).
_DROPOUT_OF_ATTENTION = 4


class _NoDropout(TorchFunctionMode):
    """Dropout is the identity while it is open, in whatever way a model spells it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args = (*args[:_DROPOUT_OF_ATTENTION], *(0.0 for _ in args[_DROPOUT_OF_ATTENTION:][:1]), *args[5:])
            kwargs = {**kwargs, **({"dropout_p": 0.0} if "dropout_p" in kwargs else {})}
        return func(*args, **kwargs)


@contextlib.contextmanager
def _without_noise(model: nn.Module) -> Iterator[None]:
    """A model as it trains, less dropout and NEFTune's noise."""
    training = model.training
    model.train()
    noisy = [module for module in model.modules() if hasattr(module, "neftune_noise_alpha")]
    strengths = [module.neftune_noise_alpha for module in noisy]
    for module in noisy:
        module.neftune_noise_alpha = torch.tensor(0.0)
    try:
        with _NoDropout():
            yield
    finally:
        model.train(training)
        for module, strength in zip(noisy, strengths, strict=True):
            module.neftune_noise_alpha = strength


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A model as it evaluates; on a CPU bitsandbytes packs weights anew then, and its backward can't take those."""
    packing = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    training = model.training
    model.eval()
    for module in packing:
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    try:
        yield
    finally:
        model.train(training)
        for module in packing:
            module.support_avx512bf16_for_cpu = True  # type: ignore[assignment]


def measured_kind(
    trainer: Any, model: nn.Module, batch: Any, items: Any, shifted: bool, tolerance: float, most_rows: int = MOST_ROWS
) -> LossKind:
    """The kind of the loss that a trainer takes of a batch that can be cut; see `cutting.measure_kind`.

    It is measured as it trains, for there are terms of all rows that are only there then. Where that is still not the
    same twice (layers that are skipped at random), as it evaluates.
    """
    if _takes_rows_together(trainer, model):
        return LossKind.WHOLE

    def loss_of(rows: Any) -> float:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            return float(trainer.compute_loss(model, trainer._prepare_inputs(rows), num_items_in_batch=items))

    def measured() -> LossKind:
        return measure_kind(batch, loss_of, shifted, tolerance, most_rows)

    with _without_noise(model):
        if _is_settled(loss_of, batch):
            return measured()
    with _evaluating(model):
        return measured()


def has_own_loss(trainer: Any, model: nn.Module) -> bool:
    """Whether the loss is a script's, in whatever place."""
    stock = type(trainer).compute_loss.__module__.startswith(("transformers.", "trl."))
    return not stock or trainer.compute_loss_func is not None or any(map(is_own, model.modules()))


def _is_settled(loss_of: Callable[[Any], float], batch: Any) -> bool:
    rows = take(batch, [0, 1])
    first, second = loss_of(rows), loss_of(rows)
    return abs(first - second) <= 1e-5 * abs(first)


def _takes_rows_together(trainer: Any, model: nn.Module) -> bool:
    """What too small a term would hide: batch norm, and the experts' load balance."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return True
    config = getattr(model, "config", None)
    configs = [config, getattr(config, "text_config", None)]
    balanced = any(
        getattr(c, "output_router_logits", False) and getattr(c, "router_aux_loss_coef", 1.0) != 0.0 for c in configs
    )
    return balanced or bool(getattr(trainer, "aux_loss_enabled", False))
