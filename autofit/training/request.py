"""What the training child is asked to do; read by the parent too, so it imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from autofit.space.candidate import Candidate
from autofit.space.facts import DeviceFacts
from autofit.space.source import ModelSource


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What of a run's config the training loop needs. `max_steps` −1: as many as `num_train_epochs` gives."""

    global_batch_size: int
    num_train_epochs: float
    max_steps: int
    learning_rate: float
    lr_scheduler_type: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    save_steps: int
    seed: int
    evaluate: bool


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """The winner of the search and what it is trained with. `cap_bytes` as in the trial.

    `estimated_bytes`: the breakdown of the candidate's estimate; None where it was not estimated.
    """

    candidate: Candidate
    source: ModelSource
    device: DeviceFacts
    cap_bytes: int
    lora_alpha: int
    schedule: Schedule
    data_dir: str
    tokenizer_dir: str
    output_dir: str
    estimated_bytes: dict[str, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; `from_json` is its inverse."""
        return {**asdict(self), "candidate": self.candidate.to_json(), "device": self.device.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainingRequest:
        parts = {
            "candidate": Candidate.from_json(data["candidate"]),
            "source": ModelSource(**data["source"]),
            "device": DeviceFacts.from_json(data["device"]),
            "schedule": Schedule(**data["schedule"]),
        }
        return cls(**{**data, **parts})
