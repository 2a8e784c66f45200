"""The losses a micro-batch can be given: each is the *sum* over trained tokens, so that cuts of a batch add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from autofit.step.batch import MicroBatch

Loss = Callable[[PeftModel, MicroBatch], torch.Tensor]

VOCABULARY_CHUNK = 8192


def full_loss(model: PeftModel, batch: MicroBatch) -> torch.Tensor:
    """Summed cross-entropy from all logits at once (rows × length × vocabulary, in float32)."""
    logits = model(**_inputs(batch)).logits
    picked = logits.flatten(0, 1).index_select(0, batch.positions)
    return F.cross_entropy(picked.float(), batch.targets, reduction="sum")


def chunked_loss(model: PeftModel, batch: MicroBatch) -> torch.Tensor:
    """The same sum without ever holding all logits: TRL's kernel, tile by tile, recomputed in backward."""
    base: Any = model.get_base_model()
    hidden = _body(base)(**_inputs(batch)).last_hidden_state
    picked = hidden.flatten(0, 1).index_select(0, batch.positions)
    vocabulary = getattr(base.config.get_text_config(), "unpadded_vocab_size", None)
    weight, bias = _head(base.get_output_embeddings(), vocabulary)
    scale, softcap = logit_transform(base.config)
    chunk = min(VOCABULARY_CHUNK, weight.shape[0])  # the kernel's tiles have this width whatever there is to fill
    log_probs = ChunkedLogProbFunction.apply(picked, weight, bias, batch.targets, 1.0, chunk, softcap, scale, ())[0]
    return -log_probs.sum()


def _inputs(batch: MicroBatch) -> dict[str, Any]:
    inputs = {"input_ids": batch.input_ids, "use_cache": False}
    return inputs if batch.packing is None else {**inputs, "position_ids": batch.packing.position_ids}


LOSSES: dict[str, Loss] = {"chunked": chunked_loss, "full": full_loss}


def supports_chunked_loss(base: Any) -> bool:
    """Whether a base's logits are its head times its last hidden state, up to a known factor and cap.

    Not so where more layers stand between the two (BERT's transform), nor, for all we know, in remote code.
    """
    body, head = _body(base), base.get_output_embeddings()
    known = type(base).__module__.startswith("transformers.") and type(base).__name__ not in _OWN_LOGITS
    if not known or body is base or not isinstance(head, nn.Linear):
        return False
    others = [child for child in base.children() if child is not body and any(True for _ in child.parameters())]
    return all(child is head for child in others)


def _body(base: Any) -> Any:
    """What comes before the head. Text models cut out of larger ones keep the larger one's name for it."""
    return base.base_model if base.base_model is not base else getattr(base, "model", base)


def _head(head: nn.Linear, vocabulary: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of the output layer, less the rows that only pad the vocabulary."""
    bias = head.bias
    return head.weight[:vocabulary], bias if bias is None else bias[:vocabulary]


# ProphetNet's logits come from a second stream of states.
_OWN_LOGITS = ("ProphetNetForCausalLM",)

# Names of configs' attributes.
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def logit_transform(config: Any) -> tuple[float, float | None]:
    """What an architecture does to its logits: a factor, then a soft cap. The names are transformers' own."""
    text = config.get_text_config()
    factor = _first(text, _FACTORS)
    divisor = _first(text, _DIVISORS)
    if divisor is not None:
        factor = divisor if text.model_type == "hyperclovax" else 1 / divisor
    # Gemma 3 caps its logits as a text model only.
    cap = None if config.model_type == "gemma3" else _first(text, _SOFT_CAPS)
    return float(1.0 if factor is None else factor), cap


def _first(config: Any, names: tuple[str, ...]) -> float | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
