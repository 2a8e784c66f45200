"""THE step: forward, loss, backward of one micro-batch. Trial and training both run this and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, masking_utils

from autofit.space.candidate import Candidate
from autofit.space.source import ModelSource
from autofit.step.batch import MicroBatch, full_rows, worst_micro_batches, worst_packed
from autofit.step.loss import LOSSES, Loss
from autofit.step.model import build_model, offload_context
from autofit.step.packing import not_packed, packed_as
from autofit.step.policy import PACKED_ATTENTION, StepPolicy
from autofit.step.recipes import (
    MAX_GRAD_NORM,
    RECIPES,
    Recipe,
    StockBatch,
    accepts_items,
    masks_are_full,
    stock_batch,
    trained_items,
)
from autofit.step.recomputing import recomputing


def _no_report(phase: str) -> None:
    del phase


@dataclass
class Step:
    """A built model with all that a micro-batch needs. Depends on no Trainer; reads no value from the device.

    Attributes:
        report: told the phase as it begins ("forward", "backward").
        attention: transformers' name of that of padded rows.
        most_tokens: a micro-batch of more is a long sequence alone: all layers recompute, from what goes to the host.
        scaler: scales the loss where the policy says so (float16), else switched off.
    """

    model: PeftModel
    policy: StepPolicy
    loss: Loss
    offload: contextlib.AbstractContextManager[Any]
    report: Callable[[str], None] = _no_report
    attention: str = "sdpa"
    most_tokens: int | None = None
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.policy.device, enabled=self.policy.loss_scaling)

    def micro_batch(self, batch: MicroBatch, normalizer: int) -> torch.Tensor:
        """Adds one micro-batch's gradients of (summed loss / `normalizer`); returns that loss, detached, on the device.

        `normalizer` is the trained tokens of the whole global batch, so that the cuts sum to the uncut loss.
        """
        batch = batch.to(self.policy.device)
        with self.offload, self._as_long(batch), self._attention(batch):
            self.report("forward")
            with self._forward():
                loss = self.loss(self.model, batch) / max(normalizer, 1)
            self.report("backward")
            self.scaler.scale(loss).backward()
        return loss.detach()

    def evaluate(self, batch: MicroBatch) -> torch.Tensor:
        """The summed loss of one micro-batch, without gradients, on the device."""
        batch = batch.to(self.policy.device)
        with torch.no_grad(), self._attention(batch), self._forward():
            return self.loss(self.model, batch)

    def accumulate(self, batches: Iterable[MicroBatch], normalizer: int) -> torch.Tensor:
        """The gradients of a whole global batch; returns its mean loss per trained token, on the device."""
        losses = [self.micro_batch(batch, normalizer) for batch in batches]
        return torch.stack(losses).sum()

    def before_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """What comes between the last micro-batch of a global batch and `optimizer.step`."""
        self.unscale(optimizer)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """After the last micro-batch: takes the loss scale out of the gradients.

        Where one is not finite all are dropped, so that `optimizer.step` changes nothing, and the scale falls.
        Does nothing (and waits for nothing) where the loss is not scaled.
        """
        if not self.policy.loss_scaling:
            return
        self.scaler.unscale_(optimizer)
        found = self.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        if any(flag.item() for flag in found.values()):
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()

    def _attention(self, batch: MicroBatch) -> contextlib.AbstractContextManager[None]:
        if batch.packing is None and self.policy.attention == PACKED_ATTENTION:
            return not_packed(self.model, self.attention)
        return packed_as(batch.packing)

    def _as_long(self, batch: MicroBatch) -> contextlib.AbstractContextManager[None]:
        if self.most_tokens is None or batch.tokens <= self.most_tokens:
            return contextlib.nullcontext()
        offloads = self.policy.device != "cpu" and isinstance(self.offload, contextlib.nullcontext)
        return recomputing(self.model, offload=offloads)

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        dtype = self.policy.autocast_dtype
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if dtype is not None:
            autocast = torch.autocast(self.policy.device, dtype=getattr(torch, dtype))
        with _rows_are_whole(), autocast:
            yield


class StockStep(Step):
    """The step of a stock trainer, in the place of ours: the same calls, the bytes of the real class.

    A micro-batch is whole rows of which every token is trained (`full_rows`); positions and targets are not read. The
    trainer counts the trained tokens itself, so `normalizer` is not read either. Between calls it keeps what the
    trainer's loop keeps: the last batches and their count, the losses, the gradients' norm.

    Attributes:
        running_loss: float32, summed over the micro-batches of the last global batch.
    """

    def __init__(self, model: PeftModel, policy: StepPolicy, recipe: Recipe, offload: Any) -> None:
        super().__init__(model, policy, LOSSES["full"], offload)
        self.recipe = recipe
        self._accepts_items = accepts_items(model.get_base_model())
        self._batches: list[StockBatch] = []
        self._items: torch.Tensor | None = None
        self.running_loss = torch.tensor(0.0, device=policy.device)
        self._last = self.running_loss
        self._norm: torch.Tensor | None = None

    def micro_batch(self, batch: MicroBatch, normalizer: int) -> torch.Tensor:
        """Adds the gradients of a global batch that is this one micro-batch; returns its loss, detached."""
        self.accumulate([batch], normalizer)
        return self._last

    def accumulate(self, batches: Iterable[MicroBatch], normalizer: int) -> torch.Tensor:
        """The gradients of a whole global batch, all of it on the device from the start; returns its mean loss."""
        made = [stock_batch(batch.input_ids, self.policy.device) for batch in batches]
        items = trained_items(made) if self._accepts_items else None
        self._batches, self._items = made, items
        self.running_loss.zero_()
        for batch in made:
            self._last = self._train(batch)
            self.running_loss += self._last
        return self.running_loss.clone()

    def evaluate(self, batch: MicroBatch) -> torch.Tensor:
        """The mean loss of one micro-batch, without gradients."""
        made = stock_batch(batch.input_ids, self.policy.device)
        with torch.no_grad(), masks_are_full():
            return self.recipe.loss(self.model, made, trained_items([made]), 1, self.policy)

    def before_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips the gradients, once they are unscaled."""
        self.unscale(optimizer)
        self._norm = None
        self._norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)

    def _train(self, batch: StockBatch) -> torch.Tensor:
        with self.offload:
            self.report("forward")
            with masks_are_full():
                loss = self.recipe.loss(self.model, batch, self._items, len(self._batches), self.policy)
            if self._items is None:
                loss = loss / len(self._batches)
            self.report("backward")
            self.scaler.scale(loss / 1).backward()  # accelerate divides again, by one
        return loss.detach()


@contextlib.contextmanager
def _rows_are_whole() -> Iterator[None]:
    """Tells transformers that no row holds two sequences; it would ask the device, and wait, at every forward."""
    stock = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = stock


def build_step(
    candidate: Candidate,
    source: ModelSource,
    policy: StepPolicy,
    lora_alpha: int,
    seed: int,
    skeleton: PreTrainedModel | None = None,
) -> Step:
    """The candidate's model and everything that its micro-batches need. For `skeleton` see `build_model`."""
    model = build_model(candidate, source, policy, lora_alpha, seed, skeleton)
    if candidate.step == "autofit":
        offload = offload_context(model, candidate)
        return Step(
            model,
            policy,
            LOSSES[candidate.loss],
            offload,
            attention=candidate.attention,
            most_tokens=candidate.token_budget,
        )
    recipe = RECIPES[candidate.step]
    recipe.prepare(model)
    return StockStep(model, policy, recipe, offload_context(model, candidate))


def costliest_batches(candidate: Candidate, vocabulary: int) -> list[MicroBatch]:
    """The micro-batches that a trial of the candidate runs, the usual first where a long one runs otherwise."""
    if candidate.step != "autofit":
        return [full_rows(candidate.micro_batch_size, candidate.max_seq_length, vocabulary)]
    if candidate.has_long_rows:
        longest = worst_micro_batches(candidate.max_seq_length, candidate.max_seq_length, vocabulary)
        return costliest_batches(candidate.usual(), vocabulary) + longest
    if candidate.layout == "packed":  # of sequences as most are: a row's tokens alone decide its memory
        usual = candidate.usual()
        return [worst_packed(usual.token_budget, usual.max_seq_length, vocabulary)]
    return worst_micro_batches(candidate.token_budget, candidate.max_seq_length, vocabulary)
