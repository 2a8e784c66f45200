"""The step on meta tensors: every allocation and release in order, and where in the step it happens."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from autofit.memory.growth import Growth, Template, constant
from autofit.memory.ledger import Ledger
from autofit.memory.scratch import SCRATCH, Scratch, bitsandbytes_scratch
from autofit.memory.stand_ins import operation_stand_ins
from autofit.memory.values import Values
from autofit.memory.work import operation_work

aten = torch.ops.aten

# Sections of a step, in the order in which a pass goes through them.
BUILD, BEFORE, FORWARD, BETWEEN, BACKWARD, AFTER, OPTIMIZER = range(7)
SECTION_NAMES = ("build", "embedding", "forward", "head and loss", "backward", "after the optimizer", "optimizer")
FREED = -1


# Operations that cuBLAS does, and what its memory is called.
GEMMS = frozenset(
    (aten.mm.default, aten.mm.out, aten.bmm.default, aten.addmm.default, aten.addmm_.default, aten.baddbmm.default)
)
WORKSPACES = "workspaces"
# TRL's buffer for a tile of logits: the only uninitialized matrix between the last layer and the first gradient.
TILE = "logits and loss"
# Labels of what is as large whatever the micro-batch is.
STATIC = frozenset(("weights", "adapters", "buffers", "gradients", "optimizer", WORKSPACES))


@dataclass(frozen=True, order=True)
class Section:
    """A stretch of a step: `kind` of the constants above, in optimizer step `step`, of layer `layer` (−1: none)."""

    step: int
    kind: int
    layer: int = -1

    def __str__(self) -> str:
        where = f" of layer {self.layer}" if self.layer >= 0 else ""
        return f"{SECTION_NAMES[self.kind]}{where}"


@dataclass
class Trace:
    """Allocations and releases of a step.

    Attributes:
        keys, sizes: event by event: which allocation, and its bytes (`FREED` where it ends).
        sections: where each stretch begins: (index of its first event, index of its first operation, section).
        flops, moved, grows: of each operation: multiply-adds × 2, bytes read and written, and with which power of the
            length its tensors grow, 0 if not with the rows either, or if it moves nothing (known only where there is a
            `Template`).
        labels: what an allocation is, where more is known than when it lives ("weights", "gradients", …).
        guesses: how often a value that nobody has was made up, by what for.
        gathered: layers from which the head and the loss take something. More than one (router logits): what they make
            of it grows with the number of layers.
        growth: allocation → how it grows with rows and length, where the micro-batch is a `Template`.
    """

    keys: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    sections: list[tuple[int, int, Section]] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    grows: list[int] = field(default_factory=list)
    labels: dict[int, str] = field(default_factory=dict)
    guesses: dict[str, int] = field(default_factory=dict)
    gathered: set[int] = field(default_factory=set)
    growth: dict[int, Growth] = field(default_factory=dict)


class Tracer(Ledger):
    """A ledger of meta tensors that also writes down each event, and the scratch that kernels take on a GPU.

    `workspace_bytes` is what cuBLAS keeps from its first product on, once for each thread that multiplies; with
    `host_too` tensors on the CPU count as well (where the target is the CPU itself). With a `template`, of whose
    size the micro-batch is, how allocations grow is written down.

    Attributes:
        section: where in the step we are.
        backward: whether autograd's thread is at work.
        owners: the layer that a storage belongs to: a parameter's, or the one in whose part of the step it was made.
        undecided: whether an operation has been met whose memory depends on values.
    """

    def __init__(
        self,
        values: Values,
        *,
        workspace_bytes: int = 0,
        scratch: bool = True,
        host_too: bool = False,
        template: Template | None = None,
    ) -> None:
        super().__init__(device_type="meta")
        self.values = values
        self.trace = Trace()
        self._stand_ins = operation_stand_ins(self._outlier_columns)
        self.undecided = False
        self._scratch = {**SCRATCH, **bitsandbytes_scratch()} if scratch else {}
        self._workspace_bytes = workspace_bytes
        self._template = template
        self._counted = ("meta", "cpu") if host_too else ("meta",)
        self._serial = 0
        self._of_storage: dict[int, int] = {}
        self._with_workspace: set[bool] = set()
        self.backward = False
        self._became: dict[int, int] = {}
        self.owners: dict[int, int] = {}
        self.section = Section(0, BUILD)
        self._begin(self.section)

    def built(self, statics: dict[int, tuple[str, int]]) -> None:
        """The model stands: what it is made of is labelled, and how it was built gets its layers.

        `statics` says of storages what they are and the layer that has them (−1: none). What was alive only while one
        was made belongs to that one's layer.
        """
        stayed = {serial: statics[key] for key, serial in self._of_storage.items() if key in statics}
        self.trace.labels = {serial: label for serial, (label, _) in stayed.items()}
        self.trace.sections = []
        layer = -1
        for event, serial in enumerate(self.trace.keys):
            made = serial
            while made not in stayed and made in self._became:
                made = self._became[made]
            layer = stayed[made][1] if made in stayed else layer
            section = Section(0, BUILD, layer)
            if not self.trace.sections or self.trace.sections[-1][2] != section:
                self.trace.sections.append((event, 0, section))
        self.trace.flops.clear()
        self.trace.moved.clear()
        self.trace.grows.clear()
        self._begin(Section(0, BUILD))
        self.peak_bytes = self.live_bytes

    def _made_of(self, args: Any, out: Any) -> None:
        """While the model is built: what each allocation was turned into, in the end a part of the model."""
        results = [self._of_storage.get(t.untyped_storage()._cdata) for t in _among((out,))]
        made = next((serial for serial in results if serial is not None), None)
        for tensor in _among(args):
            serial = self._of_storage.get(tensor.untyped_storage()._cdata)
            if made is not None and serial is not None and made > serial:
                self._became[serial] = made

    def gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """The gradients of these parameters are labelled; what the optimizer does with each belongs to its layer."""
        for parameter in parameters:
            if parameter.grad is not None:
                self.label((parameter.grad,), "gradients")
                self.owners[_identity(parameter.grad)] = self.owners.get(_identity(parameter), -1)

    def finish(self) -> Trace:
        """The trace until now; nothing that follows is written down in it."""
        trace, self.trace = self.trace, Trace()
        if self._template is not None:
            _note_growth(trace, self._template)
        return trace

    def enter(self, section: Section) -> None:
        """What follows belongs to this section."""
        if section != self.section:
            self._begin(section)

    def label(self, tensors: Iterable[torch.Tensor], name: str) -> None:
        """Says what these tensors' storages are, for the breakdown."""
        for tensor in tensors:
            key = self._of_storage.get(tensor.untyped_storage()._cdata)
            if key is not None:
                self.trace.labels[key] = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        owner = self._by_owner(args) if self.section.kind == OPTIMIZER else None
        if self.section.kind == BETWEEN:
            self.trace.gathered |= self._owners_of(args) - {-1}
        if func in GEMMS or func.namespace == "bitsandbytes":
            self._take_workspace()
        scratch = self._scratch.get(func)
        taken = self._take_scratch(scratch, args, kwargs) if scratch is not None else ()
        stand_in = self._stand_ins.get(func)
        out = stand_in(*args, **kwargs) if stand_in is not None else self.values.run(func, args, kwargs)
        if isinstance(out, torch.Tensor):
            if out.dim() == 0 and self._is_constant(func, args):
                self._ignore(out)
            else:
                self._count(out)
            if owner is not None:
                self.owners.setdefault(_identity(out), owner)
            if func is aten.empty.memory_format and self.section.kind == BETWEEN and out.dim() == 2:
                self.label((out,), TILE)
        elif isinstance(out, (tuple, list)):
            if self.section.kind == OPTIMIZER:
                self._count_for_owners(args, out)
            self._count_all(out)
        for key, size in taken:
            self._give(key, size)
        if self.section.kind == BUILD:
            self._made_of(args, out)
        flops, moved = operation_work(func, args, out)
        self.trace.flops.append(flops)
        self.trace.moved.append(moved)
        self.trace.grows.append(self._grows((args, (out,))) if moved else 0)
        return out

    def _grows(self, tensors: Any) -> int:
        if self._template is None:
            return 0
        counts = {t.numel() for t in _among(tensors)} - {0}
        if all(count % self._template.rows for count in counts):
            return 0
        return max(1, *(self._template.length_power(count) for count in counts))

    def _take_scratch(self, scratch: Scratch, args: Any, kwargs: Any) -> list[tuple[int, int]]:
        taken = [(self._take(size), size) for size in scratch(args, kwargs)]
        template = self._template
        if template is not None and taken:
            one, two = (scratch(_with_rows(args, template.rows, n), kwargs) for n in (1, 2))
            for (key, _), first, second in zip(taken, one, two, strict=True):
                self.trace.growth[key] = template.scratch(first, second)
        return taken

    def _is_constant(self, func: Any, args: Any) -> bool:
        """Whether a Python number became a tensor: the ledger on a CPU leaves these aside, too."""
        moved = func is aten._to_copy.default and "cpu" in self._counted and args[0].device.type == "cpu"
        return moved or func is aten.lift_fresh.default

    def _count_all(self, out: Any) -> None:
        for leaf in out:
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
            elif isinstance(leaf, (tuple, list)):
                self._count_all(leaf)

    def _begin(self, section: Section) -> None:
        self.section = section
        self.trace.sections.append((len(self.trace.keys), len(self.trace.flops), section))

    def _by_owner(self, args: Any) -> int | None:
        """In the optimizer, an operation on one layer's tensors belongs to that layer, and what follows from it.

        Returns the layer that has its result; None where it takes nothing of a layer (a map that all states share).
        """
        found = self._owners_of(args)
        if not found:
            return None
        owner = found.pop() if len(found) == 1 else -1
        self.enter(Section(self.section.step, OPTIMIZER, owner))
        return owner

    def _owners_of(self, args: Any) -> set[int]:
        return {self.owners[_identity(t)] for t in _among(args) if _identity(t) in self.owners}

    def _count_for_owners(self, args: Any, outs: Any) -> None:
        """A `_foreach` operation makes one tensor for each that it is given: that one's layer has it."""
        given = next((a for a in args if isinstance(a, (tuple, list)) and len(a) == len(outs)), ())
        for tensor, out in zip(given, outs, strict=False):
            owner = self.owners.get(_identity(tensor), -1)
            self.enter(Section(self.section.step, OPTIMIZER, owner))
            self._count(out)
            self.owners.setdefault(_identity(out), owner)

    def _outlier_columns(self, rows: torch.Tensor) -> int:
        """Columns of an int8 input with a value beyond the threshold: few in trained models, so none; or all."""
        self.undecided = True
        return rows.shape[-1] if self.values.fill else 0

    def _take_workspace(self) -> None:
        """Forward and backward run on threads of their own, and each thread's cuBLAS takes a workspace for good."""
        if self._workspace_bytes and self.backward not in self._with_workspace and self.section.kind != BUILD:
            self._with_workspace.add(self.backward)
            self.trace.labels[self._take(self._workspace_bytes)] = WORKSPACES

    def _take(self, size: int) -> int:
        self._serial += 1
        self.trace.keys.append(self._serial)
        self.trace.sizes.append(size)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return self._serial

    def _give(self, key: int, size: int) -> None:
        self.live_bytes -= size
        self.trace.keys.append(key)
        self.trace.sizes.append(FREED)

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type not in self._counted:
            return
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[identity] = size
        self._of_storage[identity] = self._take(size)
        if self.section.kind == FORWARD:
            self.owners[identity] = self.section.layer
        weakref.finalize(storage, self._drop, identity)

    def _drop(self, key: int) -> None:
        size = self._sizes.pop(key, 0)
        self.owners.pop(key, None)
        serial = self._of_storage.pop(key, None)
        if serial is not None:
            self._give(serial, size)


def _note_growth(trace: Trace, template: Template) -> None:
    """Says of every allocation how it grows; what is there whatever the batch is does not."""
    for key, size in zip(trace.keys, trace.sizes, strict=True):
        if size == FREED or key in trace.growth:
            continue
        label = trace.labels.get(key)
        trace.growth[key] = (
            template.tile(size) if label == TILE else constant(size) if label in STATIC else template.growth(size)
        )


def _identity(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _among(values: Any) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _among(value)


def _with_rows(args: Any, rows: int, instead: int) -> tuple[Any, ...]:
    """Arguments with tensors of another number of rows: in every dimension that `rows` divides."""

    def one(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        shape = [size // rows * instead if size % rows == 0 else size for size in value.shape]
        return torch.empty(shape, dtype=value.dtype, device="meta")

    return tuple(one(value) for value in args)
