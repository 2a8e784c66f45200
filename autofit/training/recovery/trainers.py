"""The stock trainers with recovery: in a script, the class's name changes, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from autofit.errors import UsageError
from autofit.training.fit import fit
from autofit.training.recovery.mixin import RecoveringTrainer
from autofit.training.recovery.refusals import check_arguments, check_training_arguments


class AutoFitTrainer(RecoveringTrainer, Trainer):
    """`transformers.Trainer` that goes on where it runs out of memory, with the gradient that it would have had.

    Takes what `Trainer` takes. `per_device_train_batch_size` × `gradient_accumulation_steps` stays the batch of a step.

    Raises:
        UsageError: something that recovery does not cover, see `recovery.refusals`.
        OutOfBudget: (from `train`, `evaluate`) there is no way that leaves the result as it is.
    """


class AutoFitSFTTrainer(RecoveringTrainer, SFTTrainer):
    """`trl.SFTTrainer` with the same; see `AutoFitTrainer`.

    Where the model is a name and `gpu_mem` is given, it first finds out with which arguments the run fits (`fit`).

    Raises:
        NothingFits, UsageError: also as `fit` does.
    """

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, gpu_mem: str | None = None, **kwargs: Any):
        if isinstance(model, str) and gpu_mem is not None:
            args = SFTConfig(output_dir=f"{model.rpartition('/')[2]}-SFT") if args is None else args
            check_arguments(type(self), kwargs)  # before the search, which takes its time
            check_training_arguments(type(self), args)
            if kwargs.get("peft_config") is None or kwargs.get("train_dataset") is None:
                raise UsageError("AutoFitSFTTrainer: a model by name with gpu_mem needs peft_config and train_dataset")
            args = _with_quantization(args, kwargs.pop("quantization_config", None))
            found = fit(
                model,
                train_dataset=kwargs["train_dataset"],
                args=args,
                peft_config=kwargs["peft_config"],
                gpu_mem=gpu_mem,
            )
            model, args, kwargs["peft_config"] = found.load_model(), found.args, found.peft_config
            self._foresees = False
        super().__init__(model, args, *rest, gpu_mem=gpu_mem, **kwargs)


def _with_quantization(args: SFTConfig, settings: Any) -> SFTConfig:
    """The arguments with what SFTTrainer takes beside them."""
    if settings is None:
        return args
    given: Any = args.model_init_kwargs or {}
    if "quantization_config" in given:
        raise UsageError("AutoFitSFTTrainer: quantization_config is also in args.model_init_kwargs; set it once")
    args = copy.deepcopy(args)
    args.model_init_kwargs = {**given, "quantization_config": settings}
    return args
