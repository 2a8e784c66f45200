"""Disk and host memory, checked before hours are spent: download, load and checkpoints need them."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from autofit.errors import AutofitError
from autofit.space.candidate import Candidate
from autofit.space.facts import DeviceFacts, ModelFacts
from autofit.space.units import format_bytes

# An adapter and two states of AdamW, in float32, in each of two kept checkpoints and the one being written.
_CHECKPOINTS = 3
_BYTES_PER_TRAINED_PARAMETER = 12
_LARGEST_SHARD = 5 * 10**9


def needed_disk_bytes(model: ModelFacts, trainable_parameters: int) -> int:
    """Download, checkpoints and the adapter itself, in bytes."""
    checkpoints = _CHECKPOINTS * _BYTES_PER_TRAINED_PARAMETER * trainable_parameters
    return model.download_bytes + checkpoints + 4 * trainable_parameters


def needed_host_bytes(model: ModelFacts, candidate: Candidate, device: DeviceFacts) -> int:
    """What loading takes of the host's memory: on a CPU the model itself, else the shard that is being read."""
    weights = model.weight_bytes_16bit * (2 if candidate.dtype == "float32" else 1)
    return weights if device.type == "cpu" else min(weights, _LARGEST_SHARD)


def check_resources(
    folder: Path, model: ModelFacts, candidate: Candidate, device: DeviceFacts, trainable_parameters: int
) -> None:
    """Refuses to start what will not end.

    Raises:
        AutofitError: too little free disk at `folder`, or too little host memory; says how much is missing.
    """
    disk, free = needed_disk_bytes(model, trainable_parameters), shutil.disk_usage(folder).free
    if disk > free:
        raise AutofitError(
            f"{folder}: download and checkpoints need {format_bytes(disk)} of disk, {format_bytes(free)} are free; "
            "free some or name another --output-dir"
        )
    host, available = needed_host_bytes(model, candidate, device), psutil.virtual_memory().available
    if host > available:
        raise AutofitError(
            f"loading the model needs {format_bytes(host)} of host memory, {format_bytes(available)} are available"
        )
