"""How a trial ended: a value, not an exception."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any


class TrialStatus(StrEnum):
    """FIT ran whole within the budget; OOM met the device's limit; HOST_OOM the host's."""

    FIT = "FIT"
    OOM = "OOM"
    TIMEOUT = "TIMEOUT"
    HOST_OOM = "HOST_OOM"
    CRASHED = "CRASHED"


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """What one trial measured. Sizes in bytes; None where the trial did not get that far.

    Attributes:
        phase: the phase it ended in: build, forward, backward, optimizer, eval, save (done, when it fitted).
        static_bytes: model and adapters, before the first step.
        trainable_parameters: of the adapters.
        peak_allocated_bytes, peak_reserved_bytes: of the training steps (tensors; the allocator).
        eval_peak_bytes, save_peak_bytes: the same figures that `device_bytes` is made of, in evaluation and save.
        device_bytes: the largest of all phases as the driver sees it, context included: held against the budget.
        requested_bytes: what the allocation that failed asked for.
        projected_bytes: after an OOM, what the whole step would have needed, going by how far it came.
        tokens_per_second: padded tokens, of a micro-batch (forward and backward) once warm.
        seconds: wall time of the whole trial, overhead included.
        message: for people: the error, or the end of stderr.
    """

    status: TrialStatus
    phase: str
    static_bytes: int | None = None
    trainable_parameters: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    eval_peak_bytes: int | None = None
    save_peak_bytes: int | None = None
    device_bytes: int | None = None
    requested_bytes: int | None = None
    projected_bytes: int | None = None
    tokens_per_second: float | None = None
    seconds: float = 0.0
    message: str = ""

    def to_json(self) -> dict[str, Any]:
        """A flat dict of JSON types; `from_json` is its inverse."""
        return {**asdict(self), "status": self.status.value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrialResult:
        """The result of `to_json`. Keys that are no field of a result are left aside."""
        known = {f.name for f in fields(cls)} & data.keys()
        return cls(**{**{k: data[k] for k in known}, "status": TrialStatus(data["status"])})
