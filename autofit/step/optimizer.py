"""The optimizer of a candidate, by transformers' names."""

from __future__ import annotations

import torch
from torch import nn

from autofit.space.candidate import Candidate
from autofit.step.policy import StepPolicy


def build_optimizer(
    model: nn.Module, candidate: Candidate, policy: StepPolicy, learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """AdamW over the adapters' parameters: torch's, or bitsandbytes' (8-bit and paged states)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if candidate.optimizer == "adamw_torch" and candidate.step != "autofit":
        # torch's own choice, said aloud: on a GPU foreach, on tensors that only stand in for a GPU's it would not be.
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, foreach=policy.targets_gpu)
    if candidate.optimizer == "adamw_torch":
        return torch.optim.AdamW(
            parameters,
            lr=learning_rate,
            weight_decay=weight_decay,
            fused=policy.fused_optimizer,
            foreach=False,  # its temporaries are as large as the gradients
        )
    import bitsandbytes as bnb

    return bnb.optim.AdamW(
        parameters,
        lr=learning_rate,
        weight_decay=weight_decay,
        optim_bits=8 if candidate.optimizer.endswith("8bit") else 32,
        is_paged=candidate.optimizer.startswith("paged"),
    )
