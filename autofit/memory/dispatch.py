"""Makes meta tensors take the path that the target device's tensors would: autocast, attention, and a few patches.

Kernels are registered once, for a dispatch key that nothing else uses and that sits above autograd, where CUDA's own
autocast sits; inside `Dispatch` the key is on. So the casts and kernels are recorded by autograd, and recomputation
meets them too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from autofit.memory import autocast
from autofit.memory.attention import attend
from autofit.memory.patches import patched
from autofit.memory.stand_ins import stand_ins
from autofit.space.facts import DeviceFacts

_KEY = "AutocastIPU"
_KEYS = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEY))
_active: list[Dispatch] = []


class Dispatch(contextlib.AbstractContextManager["Dispatch"]):
    """While entered, operations on meta tensors run as on `device`. For `one_tile` see `stand_ins`.

    Attributes:
        paged: by storage, bytes of each optimizer state that bitsandbytes would keep in managed memory, where no
            allocator counts it.
    """

    def __init__(self, device: DeviceFacts, one_tile: bool = False) -> None:
        self.device = device
        self.one_tile = one_tile
        self.paged: dict[int, int] = {}
        self.weights = autocast.WeightCache()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Dispatch:
        _register()
        # A trace has no work for a pool of threads; they would only wait for it, spinning.
        self._stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        _active.append(self)
        self._stack.callback(_active.remove, self)
        self._stack.enter_context(_key_on())
        self._stack.enter_context(_autocast_without_device(self.weights))
        self._stack.enter_context(_tensors_from_data())
        self._stack.enter_context(stand_ins(self.device, self.paged, self.one_tile))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


@functools.cache
def _register() -> list[torch.library.Library]:
    """The kernels, kept registered for the life of the process: they do nothing while the key is off."""
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, _KEY)
    for kind in ("LOWER_PRECISION", "FLOAT32", "FLOAT32_RESULT", "WIDEST"):
        for name in getattr(autocast, kind):
            operation = autocast.overload(name)
            if operation is not None and name != "scaled_dot_product_attention":
                aten.impl(name, _casting(operation, kind), _KEY)
    aten.impl("scaled_dot_product_attention", _attention, _KEY)
    aten.impl("dropout", _dropout, _KEY)
    return [everything, aten]


def _casting(operation: Any, kind: str) -> Callable[..., Any]:
    position = autocast.dtype_position(operation)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            if torch.is_autocast_enabled("cuda"):
                args, kwargs = autocast.autocast_arguments(kind, args, kwargs, _active[-1].weights, position)
            return operation(*args, **kwargs)

    return kernel


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    with torch._C._ExcludeDispatchKeyGuard(_KEYS):
        if query.device.type != "meta":
            return torch.ops.aten.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if torch.is_autocast_enabled("cuda"):
            inputs = (query, key, value, attn_mask)
            cast, _ = autocast.autocast_arguments("LOWER_PRECISION", inputs, {}, _active[-1].weights)
            query, key, value, attn_mask = cast
        return attend(_active[-1].device, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """On a GPU one kernel that keeps a mask of a byte an element; elsewhere a product with the noise."""
    with torch._C._ExcludeDispatchKeyGuard(_KEYS):
        if input.device.type == "meta" and _active[-1].device.type == "cuda" and train and 0 < p < 1:
            return torch.ops.aten.native_dropout(input, p, train)[0]
        return torch.ops.aten.dropout(input, p, train)


@contextlib.contextmanager
def _key_on() -> Iterator[None]:
    torch._C._dispatch_tls_set_dispatch_key_excluded(_KEY, False)
    torch._C._dispatch_tls_set_dispatch_key_included(_KEY, True)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_included(_KEY, False)
        torch._C._dispatch_tls_set_dispatch_key_excluded(_KEY, True)


@contextlib.contextmanager
def _autocast_without_device(weights: autocast.WeightCache) -> Iterator[None]:
    """`torch.autocast("cuda")` where there is no CUDA; "meta" means the same. Its switches are those models ask for."""
    init, leave = torch.autocast.__init__, torch.autocast.__exit__

    def start(
        self: Any,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        if device_type not in ("cuda", "meta"):
            init(self, device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)
            return
        self.device = "cuda"
        self.fast_dtype = dtype or torch.get_autocast_dtype("cuda")
        self._enabled = enabled
        self._cache_enabled = torch.is_autocast_cache_enabled() if cache_enabled is None else cache_enabled

    def end(self: Any, *error: Any) -> Any:
        out = leave(self, *error)
        if torch.autocast_increment_nesting() == 1:
            weights.clear()
        torch.autocast_decrement_nesting()
        return out

    with contextlib.ExitStack() as patches:
        patches.enter_context(patched(torch.autocast, "__init__", start))
        patches.enter_context(patched(torch.autocast, "__exit__", end))
        for module, name in (
            (torch, "is_autocast_enabled"),
            (torch, "get_autocast_dtype"),
            (torch.amp, "is_autocast_available"),
        ):
            patches.enter_context(patched(module, name, _meta_means_cuda(getattr(module, name))))
        yield


def _meta_means_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*("cuda" if arg == "meta" else arg for arg in args), **kwargs)


@contextlib.contextmanager
def _tensors_from_data() -> Iterator[None]:
    """`torch.tensor(data, device="meta")` is seen by no mode and would have no values: made on the CPU, then moved."""
    genuine = torch.tensor

    def tensor(data: Any, *, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != "meta":
            return genuine(data, device=device, requires_grad=requires_grad, **kwargs)
        return genuine(data, **kwargs).to("meta").requires_grad_(requires_grad)

    with patched(torch, "tensor", tensor):
        yield
