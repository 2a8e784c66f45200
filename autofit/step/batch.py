"""A global batch of sequences becomes micro-batches of at most so many tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from autofit.space.cut import cut

IGNORED = -100
Example = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class MicroBatch:
    """What is on the device at once. Right-padded: under causal attention real tokens never see the padding.

    Attributes:
        input_ids: int64 [rows, longest].
        positions: int64 [trained]: flat indices (row · longest + column) of the states that predict a trained token.
        targets: int64 [trained]: those tokens.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.input_ids, self.positions, self.targets

    @property
    def padded_tokens(self) -> int:
        return self.input_ids.numel()

    def to(self, device: str | torch.device) -> MicroBatch:
        """The same micro-batch on a device; from pinned host memory this does not wait."""
        moved = (t.to(device, non_blocking=True) for t in self.tensors)
        return MicroBatch(*moved)


def collate(examples: Sequence[Example], pad_token_id: int) -> MicroBatch:
    """Right-padded rows of `input_ids` and `labels` (same length; −100 where not trained)."""
    longest = max(len(e["input_ids"]) for e in examples)
    input_ids = torch.full((len(examples), longest), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(examples), longest), IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        for whole, name in ((input_ids, "input_ids"), (labels, "labels")):
            whole[row, : len(example[name])] = torch.tensor(example[name], dtype=torch.int64)
    following = labels[:, 1:]
    trained = following != IGNORED
    rows, columns = trained.nonzero(as_tuple=True)
    return MicroBatch(input_ids, rows * longest + columns, following[trained])


def trained_tokens(examples: Sequence[Example]) -> int:
    """Tokens that the loss of these examples sums over."""
    return sum(label != IGNORED for example in examples for label in example["labels"][1:])


def micro_batches(examples: Sequence[Example], token_budget: int, pad_token_id: int) -> Iterator[MicroBatch]:
    """The global batch, cut and collated."""
    for group in cut([len(e["input_ids"]) for e in examples], token_budget):
        yield collate([examples[i] for i in group], pad_token_id)


def worst_micro_batches(token_budget: int, max_seq_length: int, vocabulary: int) -> list[MicroBatch]:
    """The costliest micro-batches that a cut can make, every token trained.

    As many of the longest sequences as the budget holds; and where that leaves some of it unused, the fewest equal
    rows that fill it.
    """
    shapes = [(max(1, token_budget // max_seq_length), max_seq_length)]
    if token_budget > max_seq_length and token_budget % max_seq_length:
        rows = -(-token_budget // max_seq_length)
        shapes.append((rows, token_budget // rows))
    return [_all_trained(_rows(rows, length, vocabulary)) for rows, length in shapes]


def full_rows(rows: int, length: int, vocabulary: int) -> MicroBatch:
    """Rows of which every token is trained, for a step that makes its labels itself: without positions and targets."""
    nothing = torch.empty(0, dtype=torch.int64)
    return MicroBatch(_rows(rows, length, vocabulary), nothing, nothing)


def _all_trained(input_ids: torch.Tensor) -> MicroBatch:
    """What `collate` makes of these whole rows with themselves as labels; each tensor has a storage of its own."""
    positions = torch.arange(input_ids.numel()).view(input_ids.shape)[:, :-1]
    return MicroBatch(input_ids, positions.clone().flatten(), input_ids[:, 1:].clone().flatten())


def _rows(rows: int, length: int, vocabulary: int) -> torch.Tensor:
    """int64 [rows, length]: different tokens, for an architecture that routes by them."""
    return (torch.arange(rows).unsqueeze(1) * 31 + torch.arange(length)) % vocabulary
