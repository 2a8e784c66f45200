"""One optimizer step's gradients, after however many attempts."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import nn

from autofit.errors import OutOfBudget
from autofit.step.recomputing import keeps_some, recomputing
from autofit.training.recovery.faults import AGAIN, QUIET_STEPS, Record, Strain, Watch, free_memory, retried
from autofit.training.recovery.undo import Gradients, Snapshot


class Work(Protocol):
    """An optimizer step's work, in pieces of at most as many tokens as are wished; a piece has `tokens`."""

    def pieces(self, most_tokens: int | None) -> Sequence[Any]:
        """All of it; None cuts nothing that need not be."""

    def run(self, piece: Any) -> torch.Tensor:
        """Adds the gradients of a piece; returns its part of the step's loss."""

    def finer(self, failed: Any, before: Snapshot) -> int | None:
        """How many tokens a piece may have next; None where this one cannot be cut."""

    def why(self, failed: Any) -> str:
        """Why it cannot, or that it is a single sequence."""


class Thrift(IntEnum):
    """How a piece runs that does not fit as the model was built."""

    NONE = 0
    RECOMPUTE = 1
    OFFLOAD = 2


_DID = {
    Thrift.RECOMPUTE: "recomputes all activations of pieces of {} tokens or more",
    Thrift.OFFLOAD: "recomputes all activations of pieces of {} tokens or more from what is kept on the host",
}


@dataclass
class _Frugal:
    """From how many tokens on a piece is run with thrift."""

    how: Thrift = Thrift.NONE
    from_tokens: int = 0

    def around(self, model: nn.Module, tokens: int) -> contextlib.AbstractContextManager[None]:
        if self.how is Thrift.NONE or tokens < self.from_tokens:
            return contextlib.nullcontext()
        return recomputing(model, offload=self.how is Thrift.OFFLOAD)

    def next_for(self, model: nn.Module, tokens: int) -> _Frugal | None:
        """What may let a piece of so many tokens fit; None where there is nothing more."""
        if self.how is not Thrift.NONE and tokens < self.from_tokens:
            return _Frugal(self.how, tokens)
        if self.how is Thrift.NONE and keeps_some(model):
            return _Frugal(Thrift.RECOMPUTE, tokens)
        if self.how is Thrift.OFFLOAD or not _has_host(model):
            return None
        return _Frugal(Thrift.OFFLOAD, tokens if self.how is Thrift.NONE else self.from_tokens)


def _has_host(model: nn.Module) -> bool:
    """Whether activations can be kept elsewhere than where the model is."""
    return next(model.parameters()).device.type == "cuda"


class RedoesSteps:
    """Mixed into a trainer class: what it learned of how much goes through its model at once.

    After an out-of-memory the same is tried again; then in smaller pieces; a piece that cannot be cut runs with all
    activations recomputed, then from what is kept on the host. After `QUIET_STEPS` steps without another it is undone.
    """

    recovery: Record
    _most_tokens: int | None
    _planned_tokens: int | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._most_tokens = self._planned_tokens = None
        self._frugal = self._planned_frugal = _Frugal()
        self._quiet = 0
        self._fitted_tokens = 0
        self._strain = Strain()
        super().__init__(*args, **kwargs)

    def _plan(self, most_tokens: int | None, how: Thrift) -> None:
        """From now on at most so many tokens at once, all of them with this thrift."""
        self._most_tokens = self._planned_tokens = most_tokens
        self._frugal = self._planned_frugal = _Frugal(how)

    def _gradients(self, model: nn.Module, work: Work) -> tuple[Sequence[Any], list[torch.Tensor]]:
        """Leaves a step's gradients in the model; returns the pieces in which it was done, and their losses.

        Raises:
            OutOfBudget: it does not fit in any way that leaves the result as it is.
        """
        trainer: Any = self
        before = trainer._begun = retried(self.recovery, "snapshot", lambda: Snapshot(self, model))
        gradients = retried(self.recovery, "snapshot", lambda: Gradients(self, model))
        tried: list[str] = []
        while True:
            pieces = retried(self.recovery, "cut", lambda: work.pieces(self._most_tokens))
            losses: list[torch.Tensor] = []
            with self.recovery.watch() as watch:
                for piece in pieces:
                    tokens = piece.tokens
                    with self._frugal.around(model, tokens):
                        losses.append(work.run(piece))
                    self._fitted_tokens = max(self._fitted_tokens, tokens)
            if watch.fault is None:
                self._after_step(work, pieces, quiet=not tried)
                return pieces, losses
            failed = pieces[min(len(losses), len(pieces) - 1)]
            del losses
            retried(self.recovery, "snapshot", gradients.restore)
            free_memory()
            about = {"pieces": len(pieces), "largest_tokens": max(piece.tokens for piece in pieces)}
            did = None
            try:
                before.restore()
                did = self._learn(model, work, failed, before) if tried else AGAIN
            finally:
                phase = watch.within or "step"
                self.recovery.oom(watch, phase, did or "gave up", step=trainer.state.global_step, **about)
            if did is None:
                raise OutOfBudget(self._out_of_options(work.why(failed), tried, watch))
            tried.append(did)

    def _out_of_options(self, why: str, tried: list[str], watch: Watch) -> str:
        """What did not fit, what was tried, and what would fit."""
        trainer: Any = self
        fewer = "" if getattr(trainer.model, "is_loaded_in_4bit", False) else ", or load the model in fewer bits"
        fitted = f"nothing of its kind has fitted yet: give more memory{fewer}"
        if self._fitted_tokens:
            fitted = (
                f"up to {self._fitted_tokens} tokens at once have fitted: make sequences shorter, or give more memory"
            )
        step = trainer.state.global_step + 1
        return f"step {step} does not fit: {why}; tried: {', '.join(tried)}; {fitted}; {watch.fault}"

    def _learn(self, model: nn.Module, work: Work, failed: Any, before: Snapshot) -> str | None:
        """Makes the next attempt need less, and says how; None where nothing does."""
        most = work.finer(failed, before)
        if most is not None:
            self._most_tokens = most
            return f"cut into pieces of at most {most} tokens"
        frugal = self._frugal.next_for(model, failed.tokens)
        if frugal is None:
            return None
        self._frugal = frugal
        return _DID[frugal.how].format(frugal.from_tokens)

    def _after_step(self, work: Work, pieces: Sequence[Any], quiet: bool) -> None:
        self._quiet = self._quiet + 1 if quiet else 0
        if self._quiet >= QUIET_STEPS:
            self._quiet = 0
            self._grow_back(work)
        if self._strain.after_step():
            self._ease(work, pieces)

    def _grow_back(self, work: Work) -> None:
        """Larger pieces again, and no more thrift than was planned."""
        if self._most_tokens == self._planned_tokens and self._frugal == self._planned_frugal:
            return
        self._frugal = self._planned_frugal
        if self._most_tokens is not None and self._most_tokens != self._planned_tokens:
            self._most_tokens *= 2
            whole = max(piece.tokens for piece in work.pieces(self._planned_tokens))
            if self._most_tokens >= (self._planned_tokens or whole):
                self._most_tokens = self._planned_tokens
        self.recovery.add("grow", most_tokens=self._most_tokens)

    def _ease(self, work: Work, pieces: Sequence[Any]) -> None:
        """The next steps in smaller pieces, before one fails."""
        trainer: Any = self
        largest = max(pieces, key=lambda piece: piece.tokens)
        most = work.finer(largest, Snapshot(self, trainer.model))
        if most is not None:
            self._most_tokens = most
            self.recovery.add("strain", step=trainer.state.global_step, most_tokens=most)
