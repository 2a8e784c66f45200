"""What a failed attempt at a step has touched besides gradients, and how to put it back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from autofit.errors import OutOfBudget
from autofit.training.recovery.attributes import Attributes, is_own
from autofit.training.recovery.random_states import RandomStates

# Larger buffers are tables that hardly a forward pass writes to: no copies, but a look whether one did.
_LARGEST_BUFFER = 2**20
# Values of each tensor that is not kept which are compared.
_VALUES = 4
# Running figures of TRL's trainers, which count the tokens of failed attempts, too; and what is kept for other ranks.
_FIGURES = ("_metrics", "_total_train_tokens", "_gathered")


class Snapshot:
    """Random states, buffers, running figures of a trainer and what a script's own keeps, at one moment."""

    def __init__(self, trainer: Any, model: nn.Module) -> None:
        self._trainer = trainer
        self._random = RandomStates()
        others = [] if trainer is None else _other_modules(trainer)
        self._parts = [_Part(module) for module in (model, *others)]
        self._figures = {name: copy.deepcopy(getattr(trainer, name)) for name in _FIGURES if hasattr(trainer, name)}
        owners = [(module, ()) for part in self._parts for module in part.own()]
        known = getattr(trainer, "_not_of_the_script", None)
        if known is not None:
            loss = trainer.compute_loss_func
            owners += [(trainer, known), *([(loss, ())] if hasattr(loss, "__dict__") else [])]
        self._attributes = Attributes(owners)

    def restore(self, weights_moved: bool = False) -> None:
        """Everything as it was; a snapshot can be restored more than once.

        Args:
            weights_moved: the optimizer has moved the trained weights since, and back.

        Raises:
            OutOfBudget: what is not kept has changed, as a teacher does that follows the weights in the forward pass.
        """
        self._random.restore()
        for part in self._parts:
            part.put_back()
        for name, value in self._figures.items():
            setattr(self._trainer, name, copy.deepcopy(value))
        offloading: Any = getattr(self._trainer, "maybe_activation_offload_context", None)
        if hasattr(offloading, "tracker"):  # TRL's, in the middle of a pass
            offloading.tracker.clear()
            offloading.is_first_forward_call = True
        self._attributes.restore()
        for part in self._parts:
            part.check(weights_moved)


class _Part:
    """Buffers of one module at one moment, and marks of what is not kept."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._listed = _listed(module)
        self._held = [(one, dict(one._buffers)) for one in self._listed.with_buffers()]
        # Batch norm changes its statistics without counting a version, so copies and no comparison.
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in self._listed.small_buffers()]
        self._weights = _Marks(self._listed.trained)
        self._others, self._looked = self._listed.look()

    def own(self) -> list[nn.Module]:
        """Modules of classes that a script brings along."""
        return self._listed.own()

    def put_back(self) -> None:
        """The buffers, also where a forward pass has put others in their place."""
        for one, buffers in self._held:
            one._buffers.clear()
            one._buffers.update(buffers)
        for buffer, kept in self._buffers:
            buffer.data.copy_(kept)

    def check(self, weights_moved: bool) -> None:
        """Looks at what is not kept."""
        new = self._listed.unlisted(self._module)
        if new:
            _LISTED.pop(self._module, None)
            raise OutOfBudget(f"{new[0]} was not there as the step began: how it was then is not known")
        changed = [] if weights_moved else self._weights.changed()
        changed += [looked.name for looked in self._looked if looked.has_changed()] + self._others.changed()
        if changed:
            _LISTED.pop(self._module, None)
            raise OutOfBudget(f"{changed[0]} changes in the forward pass and is not kept: again it would change twice")


class Gradients:
    """Those that there are as a step begins: none, but for what a script has added in passes of its own."""

    def __init__(self, trainer: Any, model: nn.Module) -> None:
        groups = [] if trainer.optimizer is None else trainer.optimizer.param_groups
        self._model = model
        self._parameters = [p for group in groups for p in group["params"]]
        self._kept = {p: p.grad.clone() for p in self._parameters if p.grad is not None}

    def restore(self) -> None:
        """The same again."""
        self._model.zero_grad()  # accelerate's optimizer.zero_grad does nothing within a step
        for parameter in self._parameters:
            kept = self._kept.get(parameter)
            parameter.grad = None if kept is None else kept.clone()


def _other_modules(trainer: Any) -> list[nn.Module]:
    """Those of a trainer besides its model: a loss with weights or a queue of its own, a teacher."""
    return [v for k, v in vars(trainer).items() if isinstance(v, nn.Module) and k not in ("model", "model_wrapped")]


class _Marks:
    """How tensors are at one moment, going by what costs nothing: the versions that writes count, and addresses."""

    def __init__(self, named: Mapping[str, torch.Tensor]) -> None:
        self._named = named
        self.versions = [tensor._version for tensor in named.values()]
        self.addresses = [tensor.data_ptr() for tensor in named.values()]
        first = next(iter(named.values()), None)
        self._kind = None if first is None else (first.dtype, first.device)

    def changed(self) -> list[str]:
        """Names of those that are no longer so; of none where all were cast or moved, as for an evaluation."""
        now = _Marks(self._named)
        if now._kind != self._kind or now.as_before(self):
            return []
        before = zip(self._named, self.versions, self.addresses, now.versions, now.addresses, strict=True)
        return [name for name, *old, version, address in before if old != [version, address]]

    def as_before(self, other: _Marks) -> bool:
        return self.versions == other.versions and self.addresses == other.addresses


class _Listed:
    """A model's tensors, listed once, for most of its modules have none; and how those were of which no copy is kept.

    Attributes:
        trained: the weights that are, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = list(model.named_parameters(remove_duplicate=False))
        self._known = {id(p) for _, p in parameters}
        # Weakly: one may be the model itself, which this must not keep.
        self._with_buffers = {name: ref(m) for name, m in model.named_modules() if m._buffers}
        self._own = [ref(m) for m in model.modules() if is_own(m)]
        self.trained = {name: p for name, p in parameters if p.requires_grad}
        large: dict[str, torch.Tensor] = {name: b for name, b in model.named_buffers() if b.numel() >= _LARGEST_BUFFER}
        self._large = {id(buffer) for buffer in large.values()}
        frozen = {name: p for name, p in parameters if not p.requires_grad and not _is_quantized(p)}
        self._others = frozen | large
        self._marks = _Marks(self._others)
        self._looked = [_Looked(name, tensor) for name, tensor in self._others.items()]
        self._plain = [(tensor, _is_plain(tensor)) for tensor in self._others.values()]
        self._stored = self._storages()

    def small_buffers(self) -> Iterator[torch.Tensor]:
        """Those that are copied; modules put others in their place."""
        for module in self.with_buffers():
            for buffer in module._buffers.values():
                if buffer is not None and buffer.numel() < _LARGEST_BUFFER:
                    yield buffer

    def with_buffers(self) -> Iterator[nn.Module]:
        """Modules that have some."""
        yield from (module for known in self._with_buffers.values() if (module := known()) is not None)

    def own(self) -> list[nn.Module]:
        """Modules of classes that a script brings along."""
        return [module for known in self._own if (module := known()) is not None]

    def is_current(self) -> bool:
        """Whether the large buffers are still those that were listed."""
        buffers = (b for module in self.with_buffers() for b in module._buffers.values() if b is not None)
        return {id(b) for b in buffers if b.numel() >= _LARGEST_BUFFER} == self._large

    def look(self) -> tuple[_Marks, list[_Looked]]:
        """How the others are at this moment; at those that changed since the last one a closer look is taken."""
        now, storages = _Marks(self._others), self._storages()
        if not now.as_before(self._marks) or storages != self._stored:
            then = zip(self._marks.versions, self._marks.addresses, self._stored, strict=True)
            here = zip(now.versions, now.addresses, storages, strict=True)
            for number, (before, after) in enumerate(zip(then, here, strict=True)):
                if before != after:
                    looked = self._looked[number]
                    self._looked[number] = _Looked(looked.name, looked.tensor)
        self._marks, self._stored = now, storages
        return now, list(self._looked)  # a later look is none of this moment

    def _storages(self) -> list[int]:
        """Where addresses come again, those of what has been looked at do not: it is held, without its data."""
        return [t.untyped_storage()._cdata if plain else 0 for t, plain in self._plain]

    def unlisted(self, model: nn.Module) -> list[str]:
        """Parameters, and modules with buffers, that came later."""
        new = [name for name, p in model.named_parameters() if id(p) not in self._known]
        with_buffers = [name for name, module in model.named_modules() if module._buffers]
        return new + [name for name in with_buffers if name not in self._with_buffers]


_LISTED: WeakKeyDictionary[nn.Module, _Listed] = WeakKeyDictionary()


def _listed(model: nn.Module) -> _Listed:
    found = _LISTED.get(model)
    if found is None or not found.is_current():
        found = _LISTED[model] = _Listed(model)
    return found


class _Looked:
    """A tensor of which no copy is kept: writes to its `data` count no version, and addresses come again.

    Some of its values tell of writes to all of it.
    """

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self.tensor = name, tensor
        self._kind = (tensor.dtype, tensor.device)
        self._values = _values(tensor)
        # Its address does not come again while there is this reference, which keeps no data.
        self._storage = StorageWeakRef(tensor.untyped_storage()) if _is_plain(tensor) else None

    def has_changed(self) -> bool:
        tensor = self.tensor
        if (tensor.dtype, tensor.device) != self._kind:
            return False  # the whole model was cast or moved
        if self._storage is not None and StorageWeakRef(tensor.untyped_storage()) != self._storage:
            return True
        now = None if self._values is None else _values(tensor)
        if now is None or self._values is None:
            return False
        return not torch.equal(now.view(torch.uint8), self._values.view(torch.uint8))  # bytes: NaN is NaN


def _values(tensor: torch.Tensor) -> torch.Tensor | None:
    """A copy of some of its values, on its device."""
    if not _is_plain(tensor) or not tensor.is_contiguous() or tensor.numel() == 0:
        return None
    return tensor.detach().view(-1)[:: max(1, tensor.numel() // _VALUES)].clone()


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it has memory of its own, that looks as it should."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta


def _is_quantized(parameter: torch.Tensor) -> bool:
    """Those of bitsandbytes are laid out anew as they are first used, and trained by nobody."""
    return type(parameter).__module__.startswith("bitsandbytes")
