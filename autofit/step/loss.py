"""The losses a micro-batch can be given: each is the *sum* over trained tokens, so that cuts of a batch add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional as F
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from autofit.step.batch import MicroBatch

Loss = Callable[[PeftModel, MicroBatch], torch.Tensor]

VOCABULARY_CHUNK = 8192


def full_loss(model: PeftModel, batch: MicroBatch) -> torch.Tensor:
    """Summed cross-entropy from all logits at once (rows × length × vocabulary, in float32)."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits
    picked = logits.flatten(0, 1).index_select(0, batch.positions)
    return F.cross_entropy(picked.float(), batch.targets, reduction="sum")


def chunked_loss(model: PeftModel, batch: MicroBatch) -> torch.Tensor:
    """The same sum without ever holding all logits: TRL's kernel, tile by tile, recomputed in backward."""
    base: Any = model.get_base_model()
    hidden = base.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    picked = hidden.flatten(0, 1).index_select(0, batch.positions)
    head = base.get_output_embeddings()
    scale, softcap = logit_transform(base.config.get_text_config())
    chunk = min(VOCABULARY_CHUNK, head.weight.shape[0])  # the kernel's tiles have this width whatever there is to fill
    log_probs = ChunkedLogProbFunction.apply(
        picked, head.weight, getattr(head, "bias", None), batch.targets, 1.0, chunk, softcap, scale, ()
    )[0]
    return -log_probs.sum()


LOSSES: dict[str, Loss] = {"chunked": chunked_loss, "full": full_loss}


def logit_transform(config: Any) -> tuple[float, float | None]:
    """What an architecture does to its logits: a factor, then a soft cap. The names are transformers' own."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name)), getattr(config, "final_logit_softcapping", None)
    factor = getattr(config, "logits_scaling", None)
    scale = 1.0 if factor is None else factor if config.model_type == "hyperclovax" else 1 / factor
    return float(scale), getattr(config, "final_logit_softcapping", None)
