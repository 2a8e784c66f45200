"""What was measured less what was estimated, kept per kind of device and versions: a constant or two, no more."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from autofit.space.cards import card_of
from autofit.space.facts import DeviceFacts

# Whose versions change what a step needs.
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Corrections for one kind of card.

    Attributes:
        context_bytes: what the driver sees beyond the allocator: the CUDA context and its kernels.
        allocated_bytes: added to every estimate of allocated and reserved bytes.
        speed: measured tokens a second as a share of estimated ones.
    """

    context_bytes: int = 0
    allocated_bytes: int = 0
    speed: float = 1.0


# About 0.9 GiB on the H200 of the published rows; a card that was calibrated has its own.
UNCALIBRATED = Calibration(context_bytes=966_367_642)
ON_CPU = Calibration()


def load_calibration(device: DeviceFacts, warn: Callable[[str], object] = warnings.warn) -> Calibration | None:
    """What `store_calibration` kept for this kind of device and the installed versions; None where there is nothing.

    A file that cannot be read counts as none, and `warn` is told.
    """
    try:
        found = _read(calibration_file()).get(_kind(device))
        return None if found is None else _checked(found)
    except (OSError, ValueError) as error:
        warn(f"{calibration_file()} is left aside: {error}; `autofit calibrate` writes it anew")
        return None


def store_calibration(device: DeviceFacts, calibration: Calibration) -> Path:
    """Keeps the calibration in the user's cache, instead of an earlier one of the same kind; returns the file.

    Raises:
        OSError: the file cannot be written.
    """
    file = calibration_file()
    try:
        kept = _read(file)
    except (OSError, ValueError):
        kept = {}
    kept[_kind(device)] = asdict(calibration)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(json.dumps(kept, indent=2, sort_keys=True) + "\n")
        os.replace(beside, file)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    return file


def calibration_file() -> Path:
    """`autofit/calibration.json` in $XDG_CACHE_HOME, by default ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "autofit" / "calibration.json"


def _kind(device: DeviceFacts) -> str:
    """One entry's name: the device, and the versions that measured."""
    card = card_of(device.name, device.total_bytes)
    name = "cpu" if device.type == "cpu" else card.name if card is not None else device.name
    return " | ".join([name, *(f"{library} {_version(library)}" for library in _LIBRARIES)])


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "none"


def _read(file: Path) -> dict[str, Any]:
    """The entries of the file; none where there is no file."""
    if not file.exists():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no entries")
    return content


def _checked(entry: Any) -> Calibration:
    """The calibration that an entry is.

    Raises:
        ValueError: it is none.
    """
    try:
        found = Calibration(**entry)
        good = 0 < found.speed < float("inf") and all(
            isinstance(n, int) for n in (found.context_bytes, found.allocated_bytes)
        )
    except TypeError:
        good = False
    if not good:
        raise ValueError("an entry is not a calibration")
    return found
