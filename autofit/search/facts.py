"""What the trials so far prove about candidates that were not tried. No predictions: only what must be so."""

from __future__ import annotations

from enum import Enum, auto

from autofit.search.outcome import Trial
from autofit.space.candidate import OFFLOADING, Candidate
from autofit.trial.result import TrialResult, TrialStatus


class Verdict(Enum):
    """UNUSABLE: the trial timed out, crashed or filled the host, or a lighter one timed out."""

    UNKNOWN = auto()
    FITS = auto()
    TOO_BIG = auto()
    UNUSABLE = auto()


def needs_at_least(heavy: Candidate, light: Candidate) -> bool:
    """Whether `heavy` surely needs as many bytes as `light`. Nothing is sure across quantization bits.

    That fewer rows may accumulate (and keep the adapters' gradients meanwhile) is taken to weigh less than the rows.
    """
    return (
        heavy.quantization_bits == light.quantization_bits
        and heavy.micro_batch_size >= light.micro_batch_size
        and heavy.token_budget >= light.token_budget
        and heavy.max_seq_length >= light.max_seq_length
        and heavy.lora_rank >= light.lora_rank
        and heavy.checkpointed_layers <= light.checkpointed_layers
        and OFFLOADING.index(heavy.offload_activations) <= OFFLOADING.index(light.offload_activations)
        and heavy.optimizer in (light.optimizer, _unpaged(light.optimizer))
    )


def _unpaged(optimizer: str) -> str:
    return {"paged_adamw_32bit": "adamw_torch", "paged_adamw_8bit": "adamw_8bit"}.get(optimizer, optimizer)


def takes_as_long(slow: Candidate, quick: Candidate) -> bool:
    """Whether a step of `slow` surely takes as long as one of `quick`: no smaller, no less recomputed or moved."""
    return (
        slow.quantization_bits == quick.quantization_bits
        and slow.micro_batch_size >= quick.micro_batch_size
        and slow.token_budget >= quick.token_budget
        and slow.max_seq_length >= quick.max_seq_length
        and slow.lora_rank >= quick.lora_rank
        and slow.checkpointed_layers >= quick.checkpointed_layers
        and OFFLOADING.index(slow.offload_activations) >= OFFLOADING.index(quick.offload_activations)
        and slow.has_long_rows >= quick.has_long_rows
    )


def measured_need(result: TrialResult) -> int | None:
    """Bytes on the device that a fitting trial was seen to take."""
    for measured in (result.device_bytes, result.peak_reserved_bytes, result.peak_allocated_bytes):
        if measured is not None:
            return measured
    return None


class Facts:
    """The trials of one search, and what follows from them.

    Args:
        usable_bytes: what a trial's largest peak was held against.
    """

    def __init__(self, usable_bytes: int) -> None:
        self.usable_bytes = usable_bytes
        self.trials: list[Trial] = []
        self.mispredicted: list[Trial] = []

    def add(self, trial: Trial, predicted_bytes: int | None = None) -> None:
        """Takes a trial in; `predicted_bytes` is what it was thought to need before it ran."""
        self.trials.append(trial)
        if predicted_bytes is None or trial.result.status not in _OF_STATUS:
            return
        if (predicted_bytes <= self.usable_bytes) != (trial.result.status is TrialStatus.FIT):
            self.mispredicted.append(trial)

    def tried(self, candidate: Candidate) -> Trial | None:
        return next((t for t in self.trials if t.candidate == candidate), None)

    def verdict(self, candidate: Candidate) -> Verdict:
        """What is known of a candidate. Its own trial outweighs what follows from others."""
        own = self.tried(candidate)
        if own is not None:
            return _OF_STATUS.get(own.result.status, Verdict.UNUSABLE)
        if any(self._rules_out(t, candidate) for t in self.trials):
            return Verdict.TOO_BIG
        timeouts = (t for t in self.trials if t.result.status is TrialStatus.TIMEOUT)
        if any(takes_as_long(candidate, t.candidate) for t in timeouts):
            return Verdict.UNUSABLE
        fits = (t for t in self.trials if t.result.status is TrialStatus.FIT)
        if any(needs_at_least(t.candidate, candidate) for t in fits):
            return Verdict.FITS
        return Verdict.UNKNOWN

    def _rules_out(self, trial: Trial, candidate: Candidate) -> bool:
        if trial.result.status is not TrialStatus.OOM:
            return False
        if needs_at_least(candidate, trial.candidate):
            return True
        static = trial.result.static_bytes
        too_heavy_to_build = trial.result.phase == "build" or (static is not None and static > self.usable_bytes)
        # No batch, length or checkpointing makes the weights smaller.
        return (
            too_heavy_to_build
            and candidate.quantization_bits == trial.candidate.quantization_bits
            and candidate.lora_rank >= trial.candidate.lora_rank
        )


_OF_STATUS = {TrialStatus.FIT: Verdict.FITS, TrialStatus.OOM: Verdict.TOO_BIG}
