"""Which candidates may share a trace, and what of it. Candidates are told by their indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autofit.memory.growth import alike_lengths
from autofit.space.candidate import Candidate, is_checkpointed
from autofit.space.cut import BLOCK_TOKENS, whole_blocks
from autofit.space.source import ModelSource
from autofit.step.configs import load_config


def families(candidates: Sequence[Candidate], source: ModelSource) -> list[list[int]]:
    """Indices of the candidates, together where one trace may do for all."""
    groups: dict[Candidate, list[int]] = {}
    for i, candidate in enumerate(candidates):
        alike = candidate.replace(tokens_per_micro_batch=None).replace(micro_batch_size=1, max_seq_length=1)
        groups.setdefault(alike, []).append(i)
    if len(groups) == len(candidates):
        return list(groups.values())
    config = load_config(source).to_dict()
    found = []
    for indices in groups.values():
        if candidates[indices[0]].layout == "packed":
            found.append(indices)
            continue
        for lengths in alike_lengths(config, [candidates[i].max_seq_length for i in indices]):
            found.append([i for i in indices if candidates[i].max_seq_length in lengths])
    return found


def shape_of(candidate: Candidate) -> tuple[int, int]:
    """Rows and length of its costliest micro-batch; of a packed one, its blocks and what is in each."""
    if candidate.layout == "packed":
        return max(candidate.token_budget, whole_blocks(candidate.max_seq_length)) // BLOCK_TOKENS, BLOCK_TOKENS
    return candidate.micro_batch_size, candidate.max_seq_length


def kin(candidates: Sequence[Candidate], alike: Sequence[list[int]], source: ModelSource) -> list[list[list[int]]]:
    """Families together where one trace may do for all: they differ in how many layers they checkpoint only.

    The first two and the last two layers must be the same, for no row of layers begins or ends in two ways. A family
    of one is traced as it is.
    """
    if all(len(indices) == 1 for indices in alike):
        return [[indices] for indices in alike]
    num_layers = getattr(load_config(source).get_text_config(), "num_hidden_layers", 0)
    groups: dict[Any, list[list[int]]] = {}
    for number, indices in enumerate(alike):
        first = candidates[indices[0]]
        flags = [is_checkpointed(i, first.checkpointed_layers, num_layers) for i in range(num_layers)]
        plain = first.replace(tokens_per_micro_batch=None)
        plain = plain.replace(micro_batch_size=1, max_seq_length=1, checkpointed_layers=1)
        lengths = tuple(sorted({candidates[i].max_seq_length for i in indices}))
        shares = (
            len(indices) > 1
            and 0 < first.checkpointed_layers <= num_layers
            and first.step == "autofit"
            and first.offload_activations != "all"
        )
        key = (plain, lengths, tuple(flags[:2]), tuple(flags[-2:])) if shares else number
        groups.setdefault(key, []).append(indices)
    return [sorted(group, key=lambda k: -candidates[k[0]].checkpointed_layers) for group in groups.values()]


def cost(candidates: Sequence[Candidate], relatives: list[list[int]]) -> int:
    """By how much some take longer than others: what takes longest should not be begun last."""
    first = candidates[relatives[0][0]]
    return len(relatives) + (first.checkpointed_layers > 0) + 10 * (first.offload_activations == "all")
