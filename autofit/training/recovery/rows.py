"""A collated batch as rows that can be taken apart, and several as one; sequences in one row are its rows, too."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

IGNORED = -100
# Values of tokens, of which a row has as many as its mask and its labels say; of others that is not known.
_OF_TOKENS = {"input_ids", "attention_mask", "labels", "position_ids", "token_type_ids", "special_tokens_mask"}
# What a row is filled up with on its right.
_FILLING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}


def count_rows(batch: Any) -> int:
    """Rows of a batch; 0 where it has no tensor with any, or no names."""
    if not isinstance(batch, Mapping):
        return 0
    bounds = _bounds(batch)
    return _first_dimension(batch) if bounds is None else len(bounds) - 1


def _bounds(batch: Any) -> list[int] | None:
    """Where each sequence of a padding-free row begins, and its end; None where rows are rows."""
    places = batch.get("position_ids")
    if not torch.is_tensor(places) or places.dim() != 2 or places.shape[0] != 1 or "attention_mask" in batch:
        return None
    starts = (places[0] == 0).nonzero().flatten().tolist()
    return [*starts, places.shape[1]] if len(starts) > 1 and starts[0] == 0 else None


def _of_bounds(bounds: list[int], batch: Any) -> dict[str, Any]:
    """What a padding-free batch has beside its tokens for kernels that ask for bounds, of other sequences."""
    lengths = torch.tensor(bounds).diff()
    longest = int(lengths.max())
    found = {
        "cu_seq_lens_q": torch.tensor(bounds),
        "cu_seq_lens_k": torch.tensor(bounds),
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None],
    }
    return {
        name: value.to(batch[name]) if torch.is_tensor(value) and torch.is_tensor(batch[name]) else value
        for name, value in found.items()
        if name in batch
    }


def _are_equal(one: Any, other: Any) -> bool:
    both = torch.is_tensor(one) and torch.is_tensor(other)
    return torch.equal(one, other) if both else bool(not _is_many(one) and one == other)


def _first_dimension(batch: Any) -> int:
    named = [batch.get(name) for name in ("input_ids", "labels")]
    for value in (*named, *batch.values()):
        if torch.is_tensor(value) and value.dim():
            return value.shape[0]
    return 0


def can_be_cut(batch: Any) -> bool:
    """Whether every value is a row's, or one for all rows (a flag, a number)."""
    rows = count_rows(batch)
    if rows < 2:  # or none, where it has no names
        return False
    bounds = _bounds(batch)
    if bounds is not None:
        places, made = batch["position_ids"].shape, _of_bounds(bounds, batch)
        rest = [value for name, value in batch.items() if name not in made]
        as_made = all(_are_equal(batch[name], value) for name, value in made.items())
        return as_made and all(v.shape == places if torch.is_tensor(v) else not _is_many(v) for v in rest)
    return all(_is_by_row(value, rows) or not _is_many(value) for value in batch.values())


def take(batch: Any, rows: Sequence[int], *, trims: bool = True) -> Any:
    """These rows of a batch, in this order; right padding that all of them have is left away where it `trims`."""
    bounds = _bounds(batch)
    if bounds is not None:
        places = torch.cat([torch.arange(bounds[row], bounds[row + 1]) for row in rows])
        shape = batch["position_ids"].shape
        parts = {
            k: v[:, places.to(v.device)] if torch.is_tensor(v) and v.shape == shape else v for k, v in batch.items()
        }
        lengths = [bounds[row + 1] - bounds[row] for row in rows]
        return type(batch)({**parts, **_of_bounds([0, *itertools.accumulate(lengths)], batch)})
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
    if trims and width is not None and longest < width:
        for name, value in part.items():
            if torch.is_tensor(value) and value.dim() == 2 and value.shape[1] == width:
                part[name] = value[:, :longest].contiguous()
    return type(batch)(part)


def together(batches: Sequence[Any]) -> Any | None:
    """The rows of several batches as one; None where a row cannot move from one to another.

    They can where all batches have values of the same shapes, or are right-padded tokens, mask and labels.
    """
    first = batches[0]
    if not all(isinstance(batch, Mapping) for batch in batches):
        return None
    if any(set(batch) != set(first) or _bounds(batch) is not None for batch in batches):
        return None
    values = [(name, value, count_rows(batch)) for batch in batches for name, value in batch.items()]
    if not all(torch.is_tensor(value) and _is_by_row(value, rows) for _, value, rows in values):
        return None
    if all(value.shape[1:] == first[name].shape[1:] for name, value, _ in values):
        return type(first)({name: torch.cat([batch[name] for batch in batches]) for name in first})
    widths = [_width(batch) for batch in batches]
    if None in widths or not set(first) <= _FILLING.keys():
        return None
    widest = max(width for width in widths if width is not None)

    def filled(name: str) -> torch.Tensor:
        parts = (F.pad(b[name], (0, widest - b[name].shape[1]), value=_FILLING[name]) for b in batches)
        return torch.cat(list(parts))

    return type(first)({name: filled(name) for name in first})


def take_whole(batch: Any, start: int, end: int) -> Any:
    """Rows start…end−1 as they are, padding included."""
    count = count_rows(batch)
    values = {name: value[start:end] if _is_by_row(value, count) else value for name, value in batch.items()}
    return type(batch)(values)


def row_lengths(batch: Any) -> list[int]:
    """Tokens of each row: less the right padding where there is a mask that says so, else the batch's width.

    What has a label is no padding, whatever the mask says: a script may train on it, and a target be the longer one.
    """
    if not isinstance(batch, Mapping):
        return []
    bounds = _bounds(batch)
    if bounds is not None:
        return [end - begin for begin, end in itertools.pairwise(bounds)]
    if _width(batch) is not None:
        used = (batch["attention_mask"] != 0).cpu().numpy()
        if torch.is_tensor(batch.get("labels")):
            used = used | (batch["labels"] != IGNORED).cpu().numpy()
        return (used.shape[1] - used[:, ::-1].argmax(axis=1)).tolist()
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
    by_row = {name: value for name, value in batch.items() if _is_by_row(value, rows)}
    alike = all(torch.is_tensor(v) and v.shape == mask.shape and name in _OF_TOKENS for name, v in by_row.items())
    return mask.shape[1] if alike else None


def _is_by_row(value: Any, rows: int) -> bool:
    if torch.is_tensor(value):
        return value.dim() > 0 and value.shape[0] == rows
    return isinstance(value, list) and len(value) == rows


def _is_many(value: Any) -> bool:
    return (torch.is_tensor(value) and value.dim() > 0) or isinstance(value, (list, tuple, dict))
