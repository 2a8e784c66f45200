"""A collated batch as rows that can be taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

IGNORED = -100
# Batches that hold several sequences in a row: what is a row there is not for us to say.
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def count_rows(batch: Any) -> int:
    """Rows of a batch; 0 where it has no tensor with any."""
    named = [batch.get(name) for name in ("input_ids", "labels")]
    for value in (*named, *batch.values()):
        if torch.is_tensor(value) and value.dim():
            return value.shape[0]
    return 0


def can_be_cut(batch: Any) -> bool:
    """Whether every value is a row's, or one for all rows (a flag, a number)."""
    rows = count_rows(batch)
    if rows < 2 or any(name in batch for name in _PACKED):
        return False
    return all(_is_by_row(value, rows) or not _is_many(value) for value in batch.values())


def take(batch: Any, rows: Sequence[int]) -> Any:
    """These rows of a batch, in this order; right padding that all of them have is left away."""
    count = count_rows(batch)
    index = torch.tensor(rows)
    part = {
        name: value
        if not _is_by_row(value, count)
        else value[index.to(value.device)]
        if torch.is_tensor(value)
        else [value[i] for i in rows]
        for name, value in batch.items()
    }
    lengths = row_lengths(batch)
    width, longest = _width(batch), max(lengths[i] for i in rows)
    if width is not None and longest < width:
        for name, value in part.items():
            if torch.is_tensor(value) and value.dim() == 2 and value.shape[1] == width:
                part[name] = value[:, :longest].contiguous()
    return type(batch)(part)


def take_whole(batch: Any, start: int, end: int) -> Any:
    """Rows start…end−1 as they are, padding included."""
    count = count_rows(batch)
    values = {name: value[start:end] if _is_by_row(value, count) else value for name, value in batch.items()}
    return type(batch)(values)


def row_lengths(batch: Any) -> list[int]:
    """Tokens of each row: less the right padding where there is a mask that says so, else the batch's width."""
    if _width(batch) is not None:
        return batch["attention_mask"].sum(dim=1).tolist()
    ids = batch.get("input_ids")
    width = ids.shape[1] if torch.is_tensor(ids) and ids.dim() > 1 else 1
    return [width] * count_rows(batch)


def trained_items(batch: Any, shifted: bool) -> int | None:
    """Labels that the loss sees; None without labels. `shifted`: the first of each row is predicted by nothing."""
    labels = batch.get("labels")
    if not torch.is_tensor(labels):
        return None
    if shifted and labels.dim() > 1:
        labels = labels[..., 1:]
    return int((labels != IGNORED).sum())


def _width(batch: Any) -> int | None:
    """Columns of a right-padded batch of two-dimensional tensors; None for any other."""
    mask, rows = batch.get("attention_mask"), count_rows(batch)
    if not torch.is_tensor(mask) or mask.dim() != 2 or not bool((mask[:, 1:] <= mask[:, :-1]).all()):
        return None
    if not bool(mask[:, 0].all()):
        return None
    alike = all(value.shape == mask.shape for value in batch.values() if _is_by_row(value, rows))
    return mask.shape[1] if alike else None


def _is_by_row(value: Any, rows: int) -> bool:
    if torch.is_tensor(value):
        return value.dim() > 0 and value.shape[0] == rows
    return isinstance(value, list) and len(value) == rows


def _is_many(value: Any) -> bool:
    return (torch.is_tensor(value) and value.dim() > 0) or isinstance(value, (list, tuple, dict))
