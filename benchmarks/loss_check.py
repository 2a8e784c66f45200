"""Whether the chunked loss is the full one, for one architecture, on logits that are large enough to tell."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from autofit.memory.device import cpu_facts
from autofit.space.settle import settle
from autofit.space.source import ModelSource
from autofit.step.batch import worst_micro_batches
from autofit.step.inspect import inspect_model
from autofit.step.loss import chunked_loss, full_loss
from autofit.step.policy import resolve_policy
from autofit.step.step import build_step

_FACTORS = ("logits_scaling", "lm_head_multiplier", "output_multiplier", "logit_scale", "logits_mup_width_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def loss_difference(config: PreTrainedConfig, folder: Path) -> float | None:
    """|chunked − full| / full of one batch in float32; None where the step would take the full loss anyway.

    Factors become other than 1, caps bite, a padded vocabulary is cut, and the head is random and large, so that an
    architecture's own way with its logits shows. `config` is changed, and saved in `folder`.
    """
    _sharpen(config.get_text_config())
    config.save_pretrained(folder)
    source = ModelSource(model=str(folder), random_weights=True)
    device = cpu_facts()
    asked = {"micro_batch_size": 2, "max_seq_length": 48}
    candidate, _ = settle(asked, inspect_model(source), device, "float32")
    if candidate.loss == "full":
        return None
    step = build_step(candidate, source, resolve_policy(candidate, device), lora_alpha=32, seed=0)
    model = step.model.eval()
    _enlarge(model.get_base_model().get_output_embeddings())
    (batch,) = worst_micro_batches(96, 48, model.get_input_embeddings().num_embeddings)
    with torch.no_grad():
        # Some attention draws random hashes.
        torch.manual_seed(0)
        full = full_loss(model, batch)
        torch.manual_seed(0)
        chunked = chunked_loss(model, batch)
    return float((chunked - full).abs() / full)


def _sharpen(config: PreTrainedConfig) -> None:
    for name in _FACTORS:
        value = vars(config).get(name)
        if value is not None:
            setattr(config, name, 2.0 * value)
    for name in _CAPS:
        if name in vars(config):
            setattr(config, name, 5.0)
    if "unpadded_vocab_size" in vars(config):
        config.unpadded_vocab_size = config.vocab_size - 12


def _enlarge(head: nn.Linear) -> None:
    """Not in place: the weight may be the embedding's too."""
    torch.manual_seed(1)
    head.weight = nn.Parameter(torch.randn_like(head.weight) / 2, requires_grad=False)
    if head.bias is not None:
        head.bias = nn.Parameter(torch.randn_like(head.bias), requires_grad=False)
