"""A global batch of sequences becomes micro-batches of at most so many tokens: padded rows, or one packed row."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from autofit.space.cut import cut, most_sequences, pack, whole_blocks
from autofit.step.packing import Packing

IGNORED = -100
Example = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class MicroBatch:
    """What is on the device at once. Right-padded: under causal attention real tokens never see the padding.

    Attributes:
        input_ids: int64 [rows, longest]; packed: [1, tokens].
        positions: int64 [trained]: flat indices (row · longest + column) of the states that predict a trained token.
        targets: int64 [trained]: those tokens.
        packing: how several sequences lie in the one row; None where each has a row.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    packing: Packing | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        packing = () if self.packing is None else (self.packing.position_ids, self.packing.starts)
        return self.input_ids, self.positions, self.targets, *packing

    @property
    def tokens(self) -> int:
        """Padding included."""
        return self.input_ids.numel()

    @property
    def sequences(self) -> int:
        return len(self.input_ids) if self.packing is None else len(self.packing.lengths)

    def to(self, device: str | torch.device) -> MicroBatch:
        """The same micro-batch on a device; from pinned host memory this does not wait."""
        ids, positions, targets = (
            t.to(device, non_blocking=True) for t in (self.input_ids, self.positions, self.targets)
        )
        return MicroBatch(ids, positions, targets, None if self.packing is None else self.packing.to(device))


def collate(examples: Sequence[Example], pad_token_id: int) -> MicroBatch:
    """Right-padded rows of `input_ids` and `labels` (same length; −100 where not trained)."""
    longest = max(len(e["input_ids"]) for e in examples)
    input_ids = torch.full((len(examples), longest), pad_token_id, dtype=torch.int64)
    for row, example in enumerate(examples):
        input_ids[row, : len(example["input_ids"])] = _tensor(example["input_ids"])
    positions, targets = _trained(examples, range(0, len(examples) * longest, longest))
    return MicroBatch(input_ids, positions, targets)


def collate_packed(examples: Sequence[Example]) -> MicroBatch:
    """The sequences one after the other in a single row."""
    lengths = [len(e["input_ids"]) for e in examples]
    input_ids = torch.cat([_tensor(e["input_ids"]) for e in examples])[None]
    packing = _packing(lengths)
    positions, targets = _trained(examples, packing.starts.tolist())
    return MicroBatch(input_ids, positions, targets, packing)


def _packing(lengths: Sequence[int]) -> Packing:
    """Sequences of these lengths, one after the other."""
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Packing(places, starts, tuple(lengths))


def _trained(examples: Sequence[Example], begins: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and targets of a `MicroBatch` whose sequences begin at these flat indices."""
    positions, targets = [], []
    for begin, example in zip(begins, examples, strict=False):
        labels = _tensor(example["labels"])[1:]  # nothing predicts the first
        columns = (labels != IGNORED).nonzero().flatten()
        positions.append(begin + columns)
        targets.append(labels[columns])
    return torch.cat(positions), torch.cat(targets)


def _tensor(values: Sequence[int]) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int64)


def trained_tokens(examples: Sequence[Example]) -> int:
    """Tokens that the loss of these examples sums over."""
    return sum(label != IGNORED for example in examples for label in example["labels"][1:])


def micro_batches(
    examples: Sequence[Example], token_budget: int, pad_token_id: int, layout: str = "padded"
) -> Iterator[MicroBatch]:
    """The global batch, cut and collated in a candidate's `layout`."""
    lengths = [len(e["input_ids"]) for e in examples]
    for group in (pack if layout == "packed" else cut)(lengths, token_budget):
        chosen = [examples[i] for i in group]
        packed = layout == "packed" and lengths[group[0]] <= token_budget  # nothing to keep apart in a long one alone
        yield collate_packed(chosen) if packed else collate(chosen, pad_token_id)


def worst_micro_batches(token_budget: int, max_seq_length: int, vocabulary: int) -> list[MicroBatch]:
    """The costliest micro-batches that a cut can make, every token trained.

    As many of the longest sequences as the budget holds; and where that leaves some of it unused, the fewest equal
    rows that fill it.
    """
    shapes = [(max(1, token_budget // max_seq_length), max_seq_length)]
    if token_budget > max_seq_length and token_budget % max_seq_length:
        rows = -(-token_budget // max_seq_length)
        shapes.append((rows, token_budget // rows))
    return [_filled(rows, length, vocabulary) for rows, length in shapes]


def worst_packed(token_budget: int, max_seq_length: int, vocabulary: int) -> MicroBatch:
    """The costliest packed micro-batch: all tokens of the budget, trained, in as many sequences as may share a row.

    One sequence is as long as the others leave it room for, up to the longest: attention's time goes by its square.
    """
    tokens = max(token_budget, whole_blocks(max_seq_length))  # a longer sequence runs alone
    others = most_sequences(tokens) - 1
    longest = min(max_seq_length, tokens - others) if others else tokens
    ends = torch.linspace(longest, tokens, others + 1).long().tolist()
    lengths = [longest, *(end - begin for begin, end in itertools.pairwise(ends))]
    row = torch.arange(tokens) % vocabulary
    return MicroBatch(row[None], torch.arange(tokens), row.clone(), _packing(lengths))


def full_rows(rows: int, length: int, vocabulary: int) -> MicroBatch:
    """Rows of which every token is trained, for a step that makes its labels itself: without positions and targets."""
    nothing = torch.empty(0, dtype=torch.int64)
    return MicroBatch(_ids(rows, length, vocabulary), nothing, nothing)


def _filled(rows: int, length: int, vocabulary: int) -> MicroBatch:
    """`collate` of whole rows of which every token is trained; each tensor has a storage of its own."""
    ids = _ids(rows, length, vocabulary)
    positions = torch.arange(rows * length).view(rows, length)[:, :-1]
    return MicroBatch(ids, positions.clone().flatten(), ids[:, 1:].clone().flatten())


def _ids(rows: int, length: int, vocabulary: int) -> torch.Tensor:
    # Different tokens, for an architecture that routes by them.
    return (31 * torch.arange(rows)[:, None] + torch.arange(length)) % vocabulary
