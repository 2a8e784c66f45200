"""The stock trainers with recovery: in a script, the class's name changes, and nothing else."""

from __future__ import annotations

from transformers import Trainer
from trl import SFTTrainer

from autofit.training.recovery.mixin import RecoveringTrainer


class AutoFitTrainer(RecoveringTrainer, Trainer):
    """`transformers.Trainer` that goes on where it runs out of memory, with the gradient that it would have had.

    Takes what `Trainer` takes. `per_device_train_batch_size` × `gradient_accumulation_steps` stays the batch of a step.

    Raises:
        UsageError: something that recovery does not cover, see `recovery.refusals`.
        OutOfBudget: (from `train`, `evaluate`) there is no way that leaves the result as it is.
    """


class AutoFitSFTTrainer(RecoveringTrainer, SFTTrainer):
    """`trl.SFTTrainer` with the same; see `AutoFitTrainer`."""
