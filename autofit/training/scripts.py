"""What the arguments of a script's trainer mean in the words of a run."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from transformers import TrainingArguments

from autofit.errors import UsageError
from autofit.space.candidate import OPTIMIZERS


def longest_of(dataset: Any, args: TrainingArguments) -> int:
    """Tokens of the longest sequence that the trainer will see.

    Raises:
        UsageError: neither the data nor the arguments say.
    """
    most = getattr(args, "max_length", None)
    if "input_ids" in (getattr(dataset, "column_names", None) or ()) and hasattr(dataset, "__len__"):
        longest = max(map(len, dataset["input_ids"]))
        return longest if most is None else min(most, longest)
    if most is None:
        raise UsageError("fit: how long sequences are is not known; set max_length, or give a tokenized dataset")
    return int(most)


def settings_of(args: TrainingArguments, peft_config: LoraConfig, longest: int) -> dict[str, Any]:
    """The script's settings as those of a run (`config.RunConfig`).

    Raises:
        UsageError: what cannot be estimated.
    """
    optimizer = str(getattr(args.optim, "value", args.optim)).replace("adamw_torch_fused", "adamw_torch")
    if optimizer not in OPTIMIZERS:
        raise UsageError(
            f"fit: optim {optimizer} cannot be estimated; valid: adamw_torch_fused, {', '.join(OPTIMIZERS)}"
        )
    targets = peft_config.target_modules
    if not targets:
        raise UsageError('fit: peft_config names no target_modules; "all-linear" are all')
    return {
        "global_batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        "max_seq_length": longest,
        "dtype": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "optimizer": optimizer,
        "lora_rank": peft_config.r,
        "lora_alpha": int(peft_config.lora_alpha),
        "lora_dropout": peft_config.lora_dropout,
        "lora_targets": [targets] if isinstance(targets, str) else sorted(targets),
    }
