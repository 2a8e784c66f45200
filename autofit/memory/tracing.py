"""Traces a candidate's rehearsal: the model built, and its steps run, on meta tensors as on the target device."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from autofit.memory.attention import rules_of
from autofit.memory.dispatch import Dispatch
from autofit.memory.growth import Template
from autofit.memory.shrink import keep_layers, kept_layers, layer_kinds, places_in, shared_row, stands_for
from autofit.memory.trace import AFTER, BACKWARD, BEFORE, BETWEEN, FORWARD, OPTIMIZER, Section, Trace, Tracer
from autofit.memory.values import Values
from autofit.space.candidate import Candidate
from autofit.space.facts import DeviceFacts
from autofit.space.source import ModelSource
from autofit.step.configs import load_config
from autofit.step.model import checkpointable_layers, checkpointing_flags, empty_base, with_placeholders
from autofit.step.offload import STASHED
from autofit.step.policy import resolve_policy
from autofit.step.rehearsal import Rehearsal
from autofit.step.step import Step, build_step, costliest_batches


@dataclass(frozen=True)
class Traced:
    """A traced rehearsal.

    Attributes:
        trace: of the layers that were traced.
        layers: by how many layers are checkpointed: for each layer of the model, in order, which traced one stands for
            it.
        reach: how many layers away a layer may let something go.
        paged_bytes: optimizer states in managed memory, which no allocator counts.
        undecided: whether a kernel takes more where values say so (int8's outliers).
        once: whether only one optimizer step was traced, for `repeat_step` to make two of.
        tokens: padded tokens of the costliest micro-batch.
    """

    trace: Trace
    layers: dict[int, list[int]]
    reach: int
    paged_bytes: int
    undecided: bool
    once: bool
    tokens: int


def trace_candidate(
    candidate: Candidate,
    source: ModelSource,
    device: DeviceFacts,
    *,
    whole: bool = False,
    fill: bool = False,
    template: Template | None = None,
    counts: Sequence[int] = (),
) -> Traced:
    """Traces a candidate on a device that need not be there.

    A few layers stand for all, unless `whole`. `fill` is what unknown masks are taken for (see `Values`); with a
    `template` the candidate's micro-batch has its size, and stands for any other (see `Tracer`). `counts` are other
    numbers of checkpointed layers that the trace is to serve as well, where one row of layers can.

    Raises:
        UsageError: no such model, or a candidate that cannot be built.
    """
    policy = replace(resolve_policy(candidate, device), device="meta")
    skeleton = empty_base(load_config(source), policy.weight_dtype, policy.attention, source.trust_remote_code)
    num_layers = len(checkpointable_layers(skeleton))
    flags = checkpointing_flags(candidate, num_layers)
    layers = {candidate.checkpointed_layers: list(range(num_layers))}
    reach = _reach(candidate, flags)
    if not whole:
        row = _Row.of(skeleton, candidate, counts, reach)
        if len(row.kept) < num_layers and keep_layers(skeleton, row.kept):
            layers, flags = row.layers, row.flags
    with_placeholders(skeleton, candidate, policy)
    built = candidate.replace(checkpointed_layers=len(flags) if any(flags) else 0)
    on_cpu = device.type == "cpu"
    # What a stock step or TRL's offloading keeps for the next step is more than its losses.
    once = not whole and not on_cpu and candidate.step == "autofit" and candidate.offload_activations != "all"
    tracer = Tracer(
        Values(fill),
        workspace_bytes=0 if on_cpu else workspace_bytes(device),
        scratch=not on_cpu,
        host_too=on_cpu,
        template=template,
    )
    with Dispatch(device, one_tile=template is not None) as dispatch, tracer, _no_collection():
        step = build_step(built, source, policy, 2 * candidate.lora_rank, 0, skeleton)
        for layer, flag in zip(checkpointable_layers(step.model), flags, strict=True):
            layer.gradient_checkpointing = flag
        tracer.hold([*step.model.parameters(), *step.model.buffers()])
        run = _Run(tracer, step, built, on_cpu, once)
        trace, tokens = run.run()
    by_layer = [sum(dispatch.paged.get(state, 0) for state in states) for states in run.states]
    elsewhere = sum(dispatch.paged.values()) - sum(by_layer)
    trace.guesses = dict(tracer.values.guesses)
    return Traced(
        trace=trace,
        layers=layers,
        reach=reach,
        paged_bytes=elsewhere + sum(by_layer[i] for i in layers[candidate.checkpointed_layers]),
        undecided=tracer.undecided,
        once=once,
        tokens=tokens,
    )


@dataclass(frozen=True)
class _Row:
    """The layers that are traced: indices of the model's, whether each recomputes, and for which they stand."""

    kept: list[int]
    flags: list[bool]
    layers: dict[int, list[int]]

    @classmethod
    def of(cls, skeleton: Any, candidate: Candidate, counts: Sequence[int], reach: int) -> _Row:
        """A row for all numbers of checkpointed layers; where there is none, or layers differ, for the candidate's."""
        kinds = layer_kinds(skeleton)

        def row_of(count: int) -> list[tuple[Hashable, bool]]:
            flags = checkpointing_flags(candidate.replace(checkpointed_layers=count), len(kinds))
            return list(zip(kinds, flags, strict=True))

        own = row_of(candidate.checkpointed_layers)
        rows = {candidate.checkpointed_layers: own}
        if counts and len(set(kinds)) == 1:
            rows.update((count, row_of(count)) for count in counts)
        shown = shared_row(list(rows.values()), reach) if len(rows) > 1 else None
        if shown is not None:
            layers = {count: places_in(shown, row, reach) for count, row in rows.items()}
            return cls(list(range(len(shown))), [flag for _, flag in shown], layers)
        kept = kept_layers(own, reach)
        layers = {candidate.checkpointed_layers: stands_for(own, kept, reach)}
        return cls(kept, [own[i][1] for i in kept], layers)


def _reach(candidate: Candidate, flags: Sequence[bool]) -> int:
    """How many layers away a layer may let something go, with these of all layers checkpointed.

    TRL's offloading keeps a tensor until a later one is sent away, the fifth at the earliest. A layer that recomputes
    may save one only; any other saves more than that, so that its own are gone before the next such layer has ended.
    One more layer, because what is let go there hangs on what the layer before had kept.
    """
    if candidate.offload_activations != "all":
        return 1
    longest = max(len(list(run)) if flag else 0 for flag, run in itertools.groupby(flags))
    return 1 + min(longest + 1, STASHED)


def workspace_bytes(device: DeviceFacts) -> int:
    """What cuBLAS takes at a thread's first product: 32 MiB from Hopper on, else 8.125 MiB (CublasHandlePool.cpp)."""
    major = (device.compute_capability or (8, 0))[0]
    return 32 * 2**20 if major in (9, 10, 12) else 8519680


def kernels_of(device: DeviceFacts) -> Hashable:
    """What decides a trace on a GPU: two with equal kernels take the same bytes."""
    return workspace_bytes(device), rules_of(device.compute_capability or (8, 0))


class _Run:
    """The rehearsal under the tracer: labels what is there before it, and says which section each event belongs to."""

    def __init__(self, tracer: Tracer, step: Step, candidate: Candidate, on_cpu: bool, once: bool) -> None:
        self.tracer = tracer
        self.step = step
        self.candidate = candidate
        self.on_cpu = on_cpu
        self.once = once
        self.pass_number = 0
        self.backward = False
        self.layers = checkpointable_layers(step.model)
        self.states: list[list[int]] = []

    def run(self) -> tuple[Trace, int]:
        """The trace, and the padded tokens of the costliest micro-batch."""
        model = self.step.model
        vocabulary = model.get_input_embeddings().num_embeddings
        with contextlib.ExitStack() as off:
            off.enter_context(_no_modes())
            batches = costliest_batches(self.candidate, vocabulary)
        if self.on_cpu:
            batches = [batch.to("meta") for batch in batches]
        self.tracer.built(self._statics())
        rehearsal = Rehearsal(self.step, self.candidate)
        self.step.report = self._enter
        handles = self._watch_layers()
        handles.append(rehearsal.optimizer.register_step_post_hook(self._stepped))
        for index, layer in [(-1, model), *enumerate(self.layers)]:
            self.tracer.owners.update((p.untyped_storage()._cdata, index) for p in layer.parameters())
        for batch in batches:
            for count in rehearsal.counts[-1:] if self.once else rehearsal.counts:
                rehearsal.optimizer_step(batch, count)
        for handle in handles:
            handle.remove()
        self.states = [[s.untyped_storage()._cdata for s in self._states_of(layer, rehearsal)] for layer in self.layers]
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.tracer.label((s for p in trainable for s in _states(rehearsal.optimizer, p)), "optimizer")
        return self.tracer.finish(), batches[0].tokens

    def _states_of(self, layer: torch.nn.Module, rehearsal: Rehearsal) -> Iterator[torch.Tensor]:
        return (s for p in layer.parameters() if p.requires_grad for s in _states(rehearsal.optimizer, p))

    def _statics(self) -> dict[int, tuple[str, int]]:
        """By storage: what it is and the layer that has it (−1: none)."""
        model = self.step.model
        found: dict[int, tuple[str, int]] = {}
        groups = [(i, layer) for i, layer in enumerate(self.layers)] + [(-1, model)]
        for layer, module in groups:
            for parameter in module.parameters():
                label = "adapters" if parameter.requires_grad else "weights"
                for tensor in (parameter, *quantization_state(parameter)):
                    found.setdefault(tensor.untyped_storage()._cdata, (label, layer))
            for buffer in module.buffers():
                found.setdefault(buffer.untyped_storage()._cdata, ("buffers", layer))
        return found

    def _enter(self, phase: str) -> None:
        if phase == "forward":
            self.backward = self.tracer.backward = False
            self.pass_number += 1
            self.tracer.enter(Section(self.pass_number, BEFORE))
        elif phase == "backward":
            self.backward = self.tracer.backward = True
            self.tracer.enter(Section(self.pass_number, BETWEEN))
        else:
            self.tracer.gradients(self.step.model.parameters())
            self.tracer.enter(Section(self.pass_number, OPTIMIZER))

    def _stepped(self, *_: Any) -> None:
        self.tracer.enter(Section(self.pass_number, AFTER))

    def _watch_layers(self) -> list[Any]:
        handles = []
        for index, layer in enumerate(self.layers):
            handles.append(layer.register_forward_pre_hook(self._at(index)))
            handles.append(layer.register_forward_hook(self._after(index)))
        return handles

    def _at(self, index: int) -> Callable[..., None]:
        def begin(*_: Any) -> None:
            if not self.backward:
                self.tracer.enter(Section(self.pass_number, FORWARD, index))

        return begin

    def _after(self, index: int) -> Callable[..., None]:
        """After a layer's forward: the head's turn after the last; and a hook on what it returned, for its backward."""

        def end(module: Any, args: Any, output: Any) -> None:
            if self.backward:
                return
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                number = self.pass_number
                hidden.register_hook(lambda _: self.tracer.enter(Section(number, BACKWARD, index)))
            if index == len(self.layers) - 1:
                self.tracer.enter(Section(self.pass_number, BETWEEN))

        return end


def _states(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    return (value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, torch.Tensor))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps the cyclic garbage collector away: when it comes, and so what it would free, is chance."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _no_modes() -> Any:
    return torch.utils._python_dispatch._disable_current_modes()


def quantization_state(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that bitsandbytes keeps beside a quantized weight."""
    for owner in (getattr(parameter, "quant_state", None), parameter):
        nested = getattr(owner, "state2", None)
        for holder in (owner, nested):
            for name in ("absmax", "code", "offset", "CB", "SCB"):
                value = getattr(holder, name, None)
                if isinstance(value, torch.Tensor):
                    yield value
