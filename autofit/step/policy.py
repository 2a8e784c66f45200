"""What follows from the target device, resolved once and then only read."""

from __future__ import annotations

from dataclasses import dataclass

from autofit.errors import UsageError
from autofit.space.candidate import Candidate
from autofit.space.facts import DeviceFacts

# transformers' name of packed attention (`step.packing`). It has no entry among transformers' masks: none are made.
PACKED_ATTENTION = "autofit_packed"


@dataclass(frozen=True, kw_only=True)
class StepPolicy:
    """How a candidate's step runs on one type of device.

    Attributes:
        device: torch's device string ("cuda", "cpu").
        weight_dtype: of base weights that are not quantized.
        autocast_dtype: what the step's autocast computes in; None enters none.
        attention: transformers' name of the attention implementation.
        fused_optimizer: torch's one-kernel optimizer step, which needs no temporaries.
        loss_scaling: whether the loss is scaled against underflow (float16 only).
    """

    device: str
    weight_dtype: str
    autocast_dtype: str | None
    attention: str
    fused_optimizer: bool
    loss_scaling: bool

    @property
    def targets_gpu(self) -> bool:
        """Whether the step is a GPU's, also where meta tensors stand in for the GPU's."""
        return self.fused_optimizer


def default_dtype(device: DeviceFacts) -> str:
    """bfloat16 from compute capability 8.0, float16 below, float32 on a CPU."""
    if device.type == "cpu":
        return "float32"
    return "bfloat16" if device.bf16 else "float16"


def resolve_policy(candidate: Candidate, device: DeviceFacts) -> StepPolicy:
    """The policy for a candidate on a device.

    Raises:
        UsageError: a type that the device cannot compute in.
    """
    on_cpu = device.type == "cpu"
    if on_cpu and candidate.dtype == "float16":
        raise UsageError("dtype float16 needs a GPU; on a CPU use float32 or bfloat16")
    # Without autocast the float32 adapters set the type of every product, so a CPU's weights had better agree.
    autocast = None if on_cpu or candidate.dtype == "float32" else candidate.dtype
    return StepPolicy(
        device=device.type,
        weight_dtype=candidate.dtype,
        autocast_dtype=autocast,
        attention=PACKED_ATTENTION if candidate.layout == "packed" else candidate.attention,
        fused_optimizer=not on_cpu,
        loss_scaling=autocast == "float16",
    )
