"""What offloading costs in time: activations over the link to the host and back."""

from __future__ import annotations

from dataclasses import replace

from autofit.memory.estimate import Estimate
from autofit.space.candidate import Candidate
from autofit.space.cards import Card

# Of a link's figure, what copies from and to pinned memory reach.
LINK_EFFICIENCY = 0.8
# A backward pass takes about twice its forward pass.
_FORWARD_SHARE = 1 / 3


def with_link(found: list[tuple[Candidate, Estimate]], card: Card) -> list[tuple[Candidate, Estimate]]:
    """The estimates with the speed of those that offload lowered by what crosses the link.

    What an otherwise equal candidate without offloading needs more is what crosses, once each way in a micro-batch.
    One whose equal is not among `found` stays as it is.
    """
    plain = {c: e.device_bytes for c, e in found if c.offload_activations == "none"}
    slowed = []
    for candidate, estimate in found:
        held = plain.get(candidate.replace(offload_activations="none"), estimate.device_bytes)
        seconds = max(0, held - estimate.device_bytes) / (card.pcie_bytes_per_second * LINK_EFFICIENCY)
        slowed.append((candidate, _slowed(candidate, estimate, seconds)))
    return slowed


def _slowed(candidate: Candidate, estimate: Estimate, one_way: float) -> Estimate:
    speed = estimate.tokens_per_second
    if candidate.offload_activations == "none" or not speed:
        return estimate
    tokens = candidate.token_budget
    computing = tokens / speed
    if candidate.offload_activations == "checkpoints":  # copies on the compute stream: one after the other
        seconds = computing + 2 * one_way
    else:  # copies on streams of their own: the longer of both, in each pass
        forward = computing * _FORWARD_SHARE
        seconds = max(forward, one_way) + max(computing - forward, one_way)
    return replace(estimate, tokens_per_second=tokens / seconds)
