"""What the job of a plan is asked: the space, the device and the budget, as JSON between two processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from autofit.space.candidate import Candidate
from autofit.space.facts import DeviceFacts
from autofit.space.ladder import DEFAULT_ORDER, Limits
from autofit.space.source import ModelSource


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """One question to `memory.planning.run_plan`.

    Attributes:
        device: the one that is planned for; it need not be there.
        usable_bytes: what a candidate may need there, context included.
        longest: tokens that the outlook's lengths do not go beyond; None asks for no outlook (the frontier, and the
            cheapest card).
        own_dtype: whether `wish.dtype` is what the device suggested, so that another card may take its own.
        calibration: the fields of `memory.calibration.Calibration` for the device; None where there is none.
    """

    source: ModelSource
    device: DeviceFacts
    wish: Candidate
    limits: Limits
    order: tuple[str, ...] = DEFAULT_ORDER
    usable_bytes: int
    longest: int | None = None
    own_dtype: bool = True
    calibration: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; `from_json` is its inverse."""
        limits = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in vars(self.limits).items()}
        return {
            **vars(self),
            "source": asdict(self.source),
            "device": self.device.to_json(),
            "wish": self.wish.to_json(),
            "limits": {**limits, "minima": dict(self.limits.minima)},
            "order": list(self.order),
            "calibration": None if self.calibration is None else dict(self.calibration),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PlanRequest:
        limits: dict[str, Any] = {k: frozenset(v) if isinstance(v, list) else v for k, v in data["limits"].items()}
        parts = {
            "source": ModelSource(**data["source"]),
            "device": DeviceFacts.from_json(data["device"]),
            "wish": Candidate.from_json(data["wish"]),
            "limits": Limits(**limits),
            "order": tuple(data["order"]),
        }
        return cls(**{**data, **parts})
