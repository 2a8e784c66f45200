"""Batches become smaller pieces whose weighted losses add up to theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from autofit.space.cut import cut as cut_rows
from autofit.training.recovery.rows import IGNORED, can_be_cut, count_rows, row_lengths, take, together, trained_items

# So many rows a loss is measured on, where they fit.
MOST_ROWS = 8


class LossKind(StrEnum):
    """What a loss does with the rows of a batch."""

    SUM = "sum"  # of parts that know nothing of each other (transformers divides by the items of the whole step)
    ITEM_MEAN = "mean over trained tokens"
    ROW_MEAN = "mean over rows"
    WHOLE = "of all rows together"  # contrastive, batch norm, load balancing: not to be cut


@dataclass(frozen=True)
class Piece:
    """Rows that go through the model at once; `weight` is what their loss counts in that of the whole."""

    batch: Any
    weight: float = 1.0

    @property
    def tokens(self) -> int:
        """Padded: rows × longest."""
        return count_rows(self.batch) * max(row_lengths(self.batch), default=1)


def cut(
    batches: Sequence[Any], most_tokens: int | None, kind: LossKind, shifted: bool, *, keep_widths: bool = False
) -> list[Piece]:
    """The batches in pieces of at most so many padded tokens; a single row may have more.

    Where that changes no row's weight, the rows of all batches are one pool, sorted by length. Else each batch is cut.

    Args:
        most_tokens: None cuts nothing.
        shifted: see `rows.trained_items`.
        keep_widths: rows stay as wide as their batch is, padding included.
    """
    pools = most_tokens is not None and not keep_widths and _is_one_pool(batches, kind)
    pool = together(batches) if pools else None
    times = len(batches) if pool is not None and kind is LossKind.ROW_MEAN else 1
    pieces: list[Piece] = []
    for batch in batches if pool is None else [pool]:
        if most_tokens is None or not is_cuttable(batch, kind):
            pieces.append(Piece(batch))
            continue
        lengths = row_lengths(batch)
        lengths = [max(lengths)] * len(lengths) if keep_widths else lengths
        groups = [sorted(group) for group in cut_rows(lengths, most_tokens)]
        parts = [batch] if len(groups) == 1 else [take(batch, group, trims=not keep_widths) for group in groups]
        weighted = [Piece(part, times * weight_of(part, batch, kind, shifted)) for part in parts]
        # The mean of nothing is no number, whatever it is multiplied by.
        pieces += [piece for piece in weighted if piece.weight] or weighted
    return pieces


def is_cuttable(batch: Any, kind: LossKind) -> bool:
    """Whether a batch can be cut where its loss is of this kind; not where a mean over rows leaves one out."""
    if kind is LossKind.WHOLE or not can_be_cut(batch):
        return False
    return kind is not LossKind.ROW_MEAN or not _leaves_rows_out(batch)


def _leaves_rows_out(batch: Any) -> bool:
    labels = batch.get("labels")
    if not torch.is_tensor(labels) or labels.is_floating_point() or labels.dim() == 0:
        return False
    return bool((labels == IGNORED).reshape(len(labels), -1).all(dim=1).any())


def _is_one_pool(batches: Sequence[Any], kind: LossKind) -> bool:
    """Whether there are several, and a row's weight is the same in whichever of them it is."""
    alike = kind is LossKind.ROW_MEAN and len({count_rows(batch) for batch in batches}) == 1
    alike = alike and all(is_cuttable(batch, kind) or count_rows(batch) == 1 for batch in batches)
    return len(batches) > 1 and (alike or kind is LossKind.SUM)


def weight_of(part: Any, batch: Any, kind: LossKind, shifted: bool) -> float:
    """What the loss of a part counts in that of the batch."""
    if kind is LossKind.ROW_MEAN:
        return count_rows(part) / count_rows(batch)
    if kind is LossKind.ITEM_MEAN:
        return (trained_items(part, shifted) or 0) / max(1, trained_items(batch, shifted) or 0)
    return 1.0


def finer(piece: Piece, kind: LossKind) -> int | None:
    """How many tokens a piece that does not fit may have next; None where it is one row, or cannot be cut."""
    return piece.tokens // 2 if is_cuttable(piece.batch, kind) else None


def measure_kind(
    batch: Any, loss_of: Callable[[Any], float], shifted: bool, tolerance: float, most_rows: int = MOST_ROWS
) -> LossKind:
    """The kind of a loss, found out on some rows of a batch that can be cut: together, and each alone.

    They are given different numbers of trained tokens, and different classes, for equal ones cannot tell two of the
    kinds apart; and there are more than two where they fit, for there are terms that need three. `WHOLE` where no kind
    agrees, or two do: a gradient that might be another one is none.

    Args:
        loss_of: the loss of some rows, without dropout.
        tolerance: of losses, relative: what rounding may do.
    """
    together = _unequal(batch, shifted, most_rows)
    alone = [take(together, [row]) for row in range(count_rows(together))]
    whole, parts = loss_of(together), [loss_of(part) for part in alone]

    def error(kind: LossKind) -> float:
        weights = [weight_of(part, together, kind, shifted) for part in alone]
        # The mean of nothing is no number, whatever it is multiplied by.
        return abs(whole - sum(w * loss for w, loss in zip(weights, parts, strict=True) if w))

    kinds = [LossKind.SUM]
    if is_cuttable(together, LossKind.ROW_MEAN):
        kinds.append(LossKind.ROW_MEAN)
    if len({trained_items(part, shifted) for part in alone}) > 1:
        kinds.append(LossKind.ITEM_MEAN)
    good = [kind for kind in kinds if error(kind) <= tolerance * abs(whole) + 1e-7]
    return good[0] if len(good) == 1 else LossKind.WHOLE


def _unequal(batch: Any, shifted: bool, most_rows: int) -> Any:
    """Rows of a batch with different numbers of trained tokens, where labels belong to tokens; else of classes."""
    lengths = row_lengths(batch)
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    items = [trained_items(take(batch, [row]), shifted) for row in range(len(lengths))]
    labels = batch.get("labels")
    classes = labels.tolist() if torch.is_tensor(labels) and labels.dim() == 1 else items
    first = order[0]
    others = (row for row in order[1:] if (items[row], classes[row]) != (items[first], classes[first]))
    second = next(others, order[1])
    rest = [row for row in order if row not in (first, second)]
    chosen = [first, second, *rest[:: -(-len(rest) // max(1, most_rows - 2)) or 1]][:most_rows]
    rows = take(batch, chosen)
    labels = rows.get("labels")
    if items[first] != items[second] or not torch.is_tensor(labels) or len(labels) != len(chosen):
        return rows
    changed = labels.clone()
    if labels.dim() == 2:
        trained = (changed[1] != IGNORED).nonzero().flatten()
        changed[1, trained[len(trained) // 2 :]] = IGNORED
    elif labels.dim() == 1 and not labels.is_floating_point() and classes[first] == classes[second]:
        changed[1] = int(changed[1] == 0)
    return type(rows)({**rows, "labels": changed})
