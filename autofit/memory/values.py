"""What meta tensors are known to hold: integers, booleans and small floats, kept beside them on the host.

Control flow reads values (masks, positions, routing); a meta tensor has none. Each storage whose values are known has
a real storage on the CPU beside it, so that views and in-place operations stay right.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from autofit.memory.guesses import index_guess
from autofit.memory.shortcuts import SHORTCUTS

aten = torch.ops.aten

MAX_KNOWN_INTEGERS = 1 << 22
MAX_KNOWN_BOOLEANS = 1 << 16  # attention masks are larger, and nobody reads them
MAX_KNOWN_FLOATS = 1 << 11
INTEGERS = frozenset((torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))

# Their result has the same values whatever the input holds.
_SAME_WHATEVER = frozenset(("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"))

# Operations whose result has as many elements as some value says.
SHAPED_BY_VALUES = frozenset(
    (
        aten.nonzero.default,
        aten.nonzero_static.default,
        aten.masked_select.default,
        aten._unique2.default,
        aten.unique_dim.default,
        aten.unique_consecutive.default,
        aten.repeat_interleave.Tensor,
        aten.bincount.default,
        aten.histc.default,
    )
)
INDEXING = frozenset(
    (
        aten.index.Tensor,
        aten._unsafe_index.Tensor,
        aten.index_put.default,
        aten.index_put_.default,
        aten._index_put_impl_.default,
    )
)


class Values:
    """Runs operations on meta tensors and keeps track of what is known of the results.

    Attributes:
        guesses: how often a value was read that nobody has, by what was taken for it ("even routing by topk", …).
        fill: what an unknown boolean mask is taken for; a result that depends on it is a bracket.
    """

    def __init__(self, fill: bool = False) -> None:
        self.guesses: Counter[str] = Counter()
        self.fill = fill
        self._known: dict[int, torch.UntypedStorage] = {}
        self._guessed: dict[int, str] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation; its result as meta tensors, remembered where its inputs are known."""
        special = _SPECIAL.get(func)
        if special is not None:
            done, out = special(self, func, args, kwargs)
            if done:
                return out
            args = out
        shortcut = SHORTCUTS.get(func)
        if shortcut is not None and self._unknown(args[0]):
            out = shortcut(args, kwargs)
            if out is not None:
                return out
        try:
            out = func(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError) as error:
            return self._without_meta_kernel(func, args, kwargs, error)
        if isinstance(out, torch.Tensor):
            if out.dtype in INTEGERS or out.numel() <= MAX_KNOWN_FLOATS:
                self._learn(func, args, kwargs, (out,))
        elif isinstance(out, (tuple, list)):
            outs = tuple(t for t in _tensors(out))
            if any(t.dtype in INTEGERS for t in outs):
                self._learn(func, args, kwargs, outs)
        return out

    def shadow(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The tensor with its values, on the CPU; None where they are unknown."""
        if tensor.device.type != "meta":
            return tensor.detach() if tensor.numel() <= MAX_KNOWN_INTEGERS else None
        if tensor.numel() == 0:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        real = self._known.get(tensor.untyped_storage()._cdata)
        if real is None:
            return None
        return torch.empty(0, dtype=tensor.dtype).set_(real, tensor.storage_offset(), tensor.shape, tensor.stride())

    def _unknown(self, tensor: Any) -> bool:
        return (
            isinstance(tensor, torch.Tensor)
            and tensor.device.type == "meta"
            and tensor.untyped_storage()._cdata not in self._known
        )

    def remember(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """From now on the meta tensor's storage has these values (a CPU tensor of its shape)."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or tensor.numel() == 0:
            return
        weakref.finalize(storage, self._known.pop, key, None)
        if tensor.is_contiguous() and tensor.nbytes == storage.nbytes():
            self._known[key] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(value).untyped_storage()
            return
        self._known[key] = torch.zeros(storage.nbytes(), dtype=torch.uint8).untyped_storage()
        shadow = self.shadow(tensor)
        assert shadow is not None
        shadow.copy_(value)

    def guess(self, what: str) -> None:
        self.guesses[what] += 1

    def _read(self, tensors: Any) -> None:
        """These values decide what runs: those that were made up are on record from now on."""
        for tensor in _tensors(tensors):
            what = self._guessed.get(tensor.untyped_storage()._cdata) if tensor.device.type == "meta" else None
            if what is not None:
                self.guess(what)

    def _made_up(self, tensor: torch.Tensor, what: str) -> None:
        """The tensor's values are a guess, or follow from one."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._guessed:
            self._guessed[storage._cdata] = what
            weakref.finalize(storage, self._guessed.pop, storage._cdata, None)

    def _learn(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outs: tuple[torch.Tensor, ...]) -> None:
        hollow = [t for t in outs if t.device.type == "meta"]
        if not hollow or func.namespace == "bitsandbytes":  # quantized numbers, which nobody reads
            return
        schema = func._schema
        writes = schema.is_mutable
        if not writes and all(t.untyped_storage()._cdata in self._known for t in hollow):
            return  # views of what is known
        name = schema.name.partition("::")[2]
        if name.startswith(("empty", "new_empty")) or name in ("detach", "alias"):
            return
        with _disable_current_modes():
            if name in _SAME_WHATEVER:
                self._compute(func, args, kwargs, outs, self._zeros_for_unknown(args, kwargs)[0], writes)
                return
            shadows = self._shadows(args, kwargs)
            random = torch.Tag.nondeterministic_seeded in func.tags
            possible = all(map(_worth, hollow)) and not (random and hollow[0].numel() > 64)
            if shadows is not None and possible and self._compute(func, args, kwargs, outs, shadows, writes):
                return
            if writes:
                self._forget_written(schema, args, shadows)
                return
            for out in hollow:
                if out.dtype in INTEGERS and _worth(out) and out.untyped_storage()._cdata not in self._known:
                    value, what = index_guess(name, args, kwargs, out, self.fill)
                    if value is None:
                        continue
                    self.remember(out, value)
                    if what:
                        self._made_up(out, what)

    def _compute(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outs: tuple[torch.Tensor, ...],
        shadows: dict[int, torch.Tensor],
        writes: bool,
    ) -> bool:
        """Runs the operation on the values; whether that worked. An in-place one changes the kept values itself."""
        try:
            values = func(*_real(args, shadows), **_real(kwargs, shadows))
        except Exception:
            return False
        if writes:
            return True
        guesses = [self._guessed.get(t.untyped_storage()._cdata) for t in _tensors((args, tuple(kwargs.values())))]
        guess = next((what for what in guesses if what is not None), None)
        for out, value in zip(outs, _tensors(values), strict=False):
            if out.device.type == "meta" and out.shape == value.shape:
                self.remember(out, value)
                if guess is not None:
                    self._made_up(out, guess)
        return True

    def _shadows(self, args: Any, kwargs: Any) -> dict[int, torch.Tensor] | None:
        """The values of every tensor among the arguments, by id; None where one is unknown."""
        shadows: dict[int, torch.Tensor] = {}
        for tensor in _tensors((args, tuple(kwargs.values()))):
            shadow = self.shadow(tensor)
            if shadow is None:
                return None
            shadows[id(tensor)] = shadow
        return shadows

    def _forget_written(self, schema: Any, args: tuple[Any, ...], shadows: Any) -> None:
        for argument, value in zip(schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, torch.Tensor) and value.device.type == "meta":
                key = value.untyped_storage()._cdata
                if key in self._known and value.dtype in INTEGERS and shadows is None:
                    self.guess("an integer overwritten by unknown values kept its old ones")
                elif key in self._known and value.dtype not in INTEGERS:
                    self._known.pop(key, None)

    def _zeros_for_unknown(self, args: Any, kwargs: Any) -> tuple[dict[int, torch.Tensor], bool]:
        shadows, known = {}, True
        for tensor in _tensors((args, tuple(kwargs.values()))):
            shadow = self.shadow(tensor)
            known = known and shadow is not None
            shadows[id(tensor)] = torch.zeros(tensor.shape, dtype=tensor.dtype) if shadow is None else shadow
        return shadows, known

    def _hollow(self, values: Any, known: bool = True) -> Any:
        """Real results as meta tensors that remember them."""

        def one(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            out = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            if known and _worth(out):
                with _disable_current_modes():
                    self.remember(out, value)
            return out

        return tree_map(one, values)

    def _without_meta_kernel(self, func: Any, args: Any, kwargs: Any, error: Exception) -> Any:
        """Runs an operation that meta tensors cannot do on real zeros (or known values), for the result's shape."""
        if sum(t.numel() for t in _tensors((args, tuple(kwargs.values())))) > 1 << 24:
            raise error
        try:
            with _disable_current_modes():
                shadows, known = self._zeros_for_unknown(args, kwargs)
                values = func(*_real(args, shadows), **_real(kwargs, shadows))
        except Exception:
            raise error from None
        return self._hollow(values, known)

    # Operations that read values: each returns (True, result), or (False, arguments to go on with).

    def _item(self, func: Any, args: Any, kwargs: Any) -> tuple[bool, Any]:
        tensor = args[0]
        if tensor.device.type != "meta":
            return False, args
        with _disable_current_modes():
            shadow = self.shadow(tensor)
            if shadow is not None:
                self._read((tensor,))
                return True, shadow.item()
        self.guess(f"a {str(tensor.dtype).removeprefix('torch.')} read by the host")
        return True, self.fill if tensor.dtype is torch.bool else 1.0 if tensor.dtype.is_floating_point else 0

    def _draw(self, func: Any, args: Any, kwargs: Any) -> tuple[bool, Any]:
        """So many random numbers on the host are an adapter's, on its way to the device: nobody reads them."""
        tensor = args[0]
        if tensor.device.type == "meta" or tensor.numel() <= MAX_KNOWN_FLOATS:
            return False, args
        return True, tensor.zero_()

    def _equal(self, func: Any, args: Any, kwargs: Any) -> tuple[bool, Any]:
        with _disable_current_modes():
            one, other = self.shadow(args[0]), self.shadow(args[1])
            if one is not None and other is not None:
                return True, torch.equal(one, other)
        self.guess("two tensors compared by the host")
        return True, True

    def _to_host(self, func: Any, args: Any, kwargs: Any) -> tuple[bool, Any]:
        """A copy to the CPU hands over the values."""
        if func is aten.copy_.default:
            target, source = args[0], args[1]
            if target.device.type == "meta" or source.device.type != "meta":
                return False, args
        else:
            source = args[0]
            device = kwargs.get("device")
            if device is None or torch.device(device).type == "meta" or source.device.type != "meta":
                return False, args
        with _disable_current_modes():
            shadow = self.shadow(source)
        self._read((source,))
        if shadow is None:
            self.guess("a tensor copied to the host")
            shadow = torch.zeros(source.shape, dtype=source.dtype)
        return True, args[0].copy_(shadow) if func is aten.copy_.default else func(shadow, **kwargs)

    def _by_mask(self, func: Any, args: Any, kwargs: Any) -> tuple[bool, Any]:
        """Boolean masks as indices become the indices of what is true in them."""
        indices = args[1]
        if not any(
            i is not None and (i.dtype in (torch.bool, torch.uint8) or i.device.type != "meta") for i in indices
        ):
            return False, args
        if args[0].device.type != "meta":
            return False, args
        new: list[Any] = []
        for index in indices:
            if index is None or (index.device.type == "meta" and index.dtype not in (torch.bool, torch.uint8)):
                new.append(index)
                continue
            self._read((index,))
            with _disable_current_modes():
                shadow = self.shadow(index)
                if shadow is None:
                    self.guess("a mask")
                    shadow = torch.full(index.shape, self.fill, dtype=torch.bool)
                found = shadow.nonzero(as_tuple=True) if shadow.dtype in (torch.bool, torch.uint8) else (shadow,)
            new += [self._hollow(i) for i in found]
        return False, (args[0], new, *args[2:])

    def _shaped_by_values(self, func: Any, args: Any, kwargs: Any) -> tuple[bool, Any]:
        if all(t.device.type != "meta" for t in _tensors((args, tuple(kwargs.values())))):
            return False, args
        with _disable_current_modes():
            shadows, known = self._zeros_for_unknown(args, kwargs)
            self._read((args, tuple(kwargs.values())))
            if not known:
                self.guess(func._schema.name.partition("::")[2])
                if self.fill:
                    shadows = {key: torch.ones_like(value) for key, value in shadows.items()}
            dtype = args[0].dtype
            if func is aten.histc.default and not dtype.is_floating_point:  # the CPU counts floats only
                shadows = {key: value.float() for key, value in shadows.items()}
            values = func(*_real(args, shadows), **_real(kwargs, shadows))
            if func is aten.histc.default:
                values = values.to(dtype)
        return True, self._hollow(values)


_Handler = Callable[[Values, Any, Any, Any], tuple[bool, Any]]
_SPECIAL: dict[Any, _Handler] = {
    aten._local_scalar_dense.default: Values._item,
    aten.equal.default: Values._equal,
    aten.uniform_.default: Values._draw,
    aten._to_copy.default: Values._to_host,
    aten.copy_.default: Values._to_host,
    **dict.fromkeys(INDEXING, Values._by_mask),
    **dict.fromkeys(SHAPED_BY_VALUES, Values._shaped_by_values),
}


def _worth(tensor: torch.Tensor) -> bool:
    if tensor.dtype is torch.bool:
        return tensor.numel() <= MAX_KNOWN_BOOLEANS
    return tensor.numel() <= (MAX_KNOWN_INTEGERS if tensor.dtype in INTEGERS else MAX_KNOWN_FLOATS)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensors(item)


def _real(tree: Any, shadows: dict[int, torch.Tensor]) -> Any:
    """Arguments with every tensor replaced by its values, and every device by the CPU."""

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return shadows[id(value)]
        return torch.device("cpu") if isinstance(value, torch.device) else value

    return tree_map(one, tree)
