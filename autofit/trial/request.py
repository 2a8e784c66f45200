"""What a trial is asked to do; read by the parent too, so it imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from autofit.space.candidate import Candidate
from autofit.space.facts import DeviceFacts
from autofit.space.source import ModelSource


@dataclass(frozen=True, kw_only=True)
class TrialRequest:
    """One candidate to try.

    Attributes:
        cap_bytes: what the process may take, CUDA context included (the budget less headroom).
        budget_bytes: what the largest peak, as the driver sees it, is held against.
    """

    candidate: Candidate
    source: ModelSource
    device: DeviceFacts
    cap_bytes: int
    budget_bytes: int
    lora_alpha: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; `from_json` is its inverse."""
        return {
            **asdict(self),
            "candidate": self.candidate.to_json(),
            "source": asdict(self.source),
            "device": self.device.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrialRequest:
        parts = {
            "candidate": Candidate.from_json(data["candidate"]),
            "source": ModelSource(**data["source"]),
            "device": DeviceFacts.from_json(data["device"]),
        }
        return cls(**{**data, **parts})
