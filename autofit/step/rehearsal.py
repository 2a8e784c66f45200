"""What a trial runs and an estimate traces: optimizer steps on the costliest micro-batch, nothing else of training."""

from __future__ import annotations

import torch

from autofit.space.candidate import Candidate
from autofit.step.batch import MicroBatch
from autofit.step.optimizer import build_optimizer
from autofit.step.step import Step, StockStep


class Rehearsal:
    """A built step with its optimizer and what the Trainer's loop keeps beside it."""

    def __init__(self, step: Step, candidate: Candidate) -> None:
        self.step = step
        self.candidate = candidate
        self.optimizer = build_optimizer(step.model, candidate, step.policy, learning_rate=1e-5)
        device = step.policy.device
        # What the Trainer keeps of earlier steps: its running losses. A stock step has its own.
        self._running = None if isinstance(step, StockStep) else torch.zeros(8, dtype=torch.float64, device=device)

    @property
    def counts(self) -> tuple[int, int]:
        """Micro-batches of each optimizer step: the second, warm one has two where training accumulates."""
        return (1, 2 if self.candidate.accumulates else 1)

    def optimizer_step(self, batch: MicroBatch, micro_batches: int) -> None:
        """One optimizer step of so many micro-batches, all like `batch`. Reports "optimizer" after their gradients."""
        normalizer = micro_batches * batch.targets.numel()
        self.step.accumulate([batch] * micro_batches, normalizer)
        self.step.report("optimizer")
        self.step.before_optimizer(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
