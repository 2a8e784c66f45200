"""What `autofit probe` runs in a child process: one candidate as it is asked for, settled here and then tried."""

from __future__ import annotations

from typing import Any

from autofit.errors import UsageError
from autofit.memory.device import cpu_facts, detect_device
from autofit.space.budget import MemoryBudget, make_budget
from autofit.space.facts import DeviceFacts
from autofit.space.settle import settle
from autofit.space.source import ModelSource
from autofit.step.inspect import has_weights, inspect_model
from autofit.step.policy import default_dtype
from autofit.trial.child import run_trial
from autofit.trial.phases import PhaseReport
from autofit.trial.request import TrialRequest


def run_probe(request: dict[str, Any], report: PhaseReport) -> dict[str, Any]:
    """Settles and tries the candidate `request["asked"]`.

    Args:
        request: asked (see `settle`), model, trust_remote_code, device ("cuda", "cpu"), gpu_mem (a budget as text;
            None: all that the device has), seed.

    Returns:
        A `TrialResult` as JSON. The candidate as settled (`candidate`), `notes` and `lora_targets_used` stand in the
        phase record, whatever becomes of the trial.

    Raises:
        UsageError, AccessError: no such device or model, or a value that one of them rules out.
        torch.OutOfMemoryError: the budget was crossed.
    """
    report("settle")
    device = _device(request["device"])
    random_weights = not has_weights(request["model"])
    source = ModelSource(
        model=request["model"], random_weights=random_weights, trust_remote_code=request["trust_remote_code"]
    )
    model = inspect_model(source)
    candidate, notes = settle(request["asked"], model, device, default_dtype(device))
    weights = "random weights, at full size" if random_weights else "the weights on disk"
    report("settle", candidate=candidate.to_json(), notes=[f"measured on {device.name} with {weights}", *notes])
    budget = _budget(request["gpu_mem"], device)
    trial = TrialRequest(
        candidate=candidate,
        source=source,
        device=device,
        cap_bytes=budget.usable_bytes,
        budget_bytes=budget.total_bytes,
        lora_alpha=2 * candidate.lora_rank,
        seed=request["seed"],
    )
    return run_trial(trial.to_json(), report)


def tell_device(request: dict[str, Any], report: PhaseReport) -> dict[str, Any]:
    """The present device, as `DeviceFacts` in JSON."""
    return detect_device().to_json()


def _device(asked: str) -> DeviceFacts:
    if asked == "cpu":
        return cpu_facts()
    device = detect_device()
    if device.type != asked:
        raise UsageError("no GPU here; device: cpu measures on the CPU, and `autofit estimate` needs no GPU")
    return device


def _budget(asked: str | None, device: DeviceFacts) -> MemoryBudget:
    """What was asked for, less headroom; the device whole where nothing was."""
    return MemoryBudget(total_bytes=device.total_bytes) if asked is None else make_budget(asked, device)
