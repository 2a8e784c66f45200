"""autofit: the auto-tuning QLoRA trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autofit.errors import OutOfBudget
    from autofit.training.fit import fit
    from autofit.training.recovery.trainers import AutoFitSFTTrainer, AutoFitTrainer

__version__ = "0.1.0"
__all__ = ["AutoFitSFTTrainer", "AutoFitTrainer", "OutOfBudget", "__version__", "fit"]

# Importing autofit must import nothing heavy: each name is fetched when it is asked for.
_HOMES = {
    "AutoFitSFTTrainer": "autofit.training.recovery.trainers",
    "AutoFitTrainer": "autofit.training.recovery.trainers",
    "OutOfBudget": "autofit.errors",
    "fit": "autofit.training.fit",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module autofit has no attribute {name}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
