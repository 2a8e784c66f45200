"""Disk and host memory, checked before hours are spent: download, load and checkpoints need them."""

from __future__ import annotations

import os
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


def checkpoint_bytes(trainable_parameters: int) -> int:
    """Checkpoints and the adapter itself."""
    return (_CHECKPOINTS * _BYTES_PER_TRAINED_PARAMETER + 4) * trainable_parameters


def hub_cache() -> Path:
    """Where the hub's client keeps what it downloads, as its documentation says."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))).expanduser()


def _check_disk(folder: Path, needed: int, what: str, instead: str) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise AutofitError(
            f"{folder}: {what} need {format_bytes(needed)} of disk, {format_bytes(free)} are free; "
            f"free some or {instead}"
        )


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
    _check_disk(folder, checkpoint_bytes(trainable_parameters), "checkpoints", "name another --output-dir")
    _check_disk(hub_cache(), model.download_bytes, "the model's download", "point HF_HOME elsewhere")
    host, available = needed_host_bytes(model, candidate, device), psutil.virtual_memory().available
    if host > available:
        raise AutofitError(
            f"loading the model needs {format_bytes(host)} of host memory, {format_bytes(available)} are available"
        )
