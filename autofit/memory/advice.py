"""What would change an estimate most: the steps that a user can take at once, each estimated."""

from __future__ import annotations

from dataclasses import dataclass

from autofit.memory.calibration import Calibration
from autofit.memory.derive import estimate_many
from autofit.memory.estimate import Estimate
from autofit.memory.settled import Settled
from autofit.space.candidate import Candidate

MOST_PIECES = 3
# What saves less is not worth a word.
LEAST_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One change of a candidate and what it would take then. `lossy` where training is another one with it."""

    words: str
    lossy: bool
    candidate: Candidate
    estimate: Estimate


def advice(settled: Settled, now: Estimate, calibration: Calibration | None = None) -> list[Advice]:
    """At most `MOST_PIECES` changes that need clearly less than `now`, the one that needs least first."""
    changes = _changes(settled)
    candidates = [candidate for _, _, candidate in changes]
    estimates = estimate_many(candidates, settled.source, settled.device, calibration)
    found = [
        Advice(words=words, lossy=lossy, candidate=candidate, estimate=estimate)
        for (words, lossy, candidate), estimate in zip(changes, estimates, strict=True)
        if isinstance(estimate, Estimate) and estimate.device_bytes < (1 - LEAST_SHARE) * now.device_bytes
    ]
    return sorted(found, key=lambda change: change.estimate.device_bytes)[:MOST_PIECES]


def _changes(settled: Settled) -> list[tuple[str, bool, Candidate]]:
    """Words, lossy and the changed candidate, for each thing that is not yet as lean as it can be."""
    now, model = settled.candidate, settled.model
    changes = []
    layers = model.checkpointable_layers
    if now.checkpointed_layers < layers:
        changes.append((f"all {layers} layers checkpointed", False, now.replace(checkpointed_layers=layers)))
    if now.micro_batch_size > 1:
        rows = now.micro_batch_size // 2
        changes.append((f"micro-batch {rows} instead of {now.micro_batch_size}", False, _with_rows(now, rows)))
    elif now.max_seq_length >= 4:
        length = now.max_seq_length // 2
        changes.append((f"sequences of {length:,} tokens", True, now.replace(max_seq_length=length)))
    if now.quantization_bits > 4 and model.quantized_bits is None:
        changes.append(("weights in 4 bits", True, now.replace(quantization_bits=4)))
    if now.optimizer == "adamw_torch" and settled.device.type == "cuda":
        changes.append(("optimizer paged_adamw_32bit", False, now.replace(optimizer="paged_adamw_32bit")))
    if now.loss == "full" and model.chunked_loss and now.step == "autofit":
        changes.append(("the chunked loss", False, now.replace(loss="chunked")))
    return changes


def _with_rows(candidate: Candidate, rows: int) -> Candidate:
    """With so many rows; gradients of the earlier micro-batches then wait for the later ones."""
    return candidate.replace(micro_batch_size=rows, accumulates=True)
