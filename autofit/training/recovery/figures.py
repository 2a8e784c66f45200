"""Figures that TRL's trainer gathers from all ranks within each loss: kept until a step is through, then put together.

A collective within what one rank does again would put the ranks out of step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from autofit.errors import UsageError

Row = list[Any]
# What `SFTTrainer.compute_loss` gathers, in its order: trained tokens, entropy, correct tokens; in training then all
# tokens; of mixtures of experts the load-balancing loss.
_RATIOS = {"entropy": 1, "mean_token_accuracy": 2}
_TOKENS = 3


@contextlib.contextmanager
def local_figures(trainer: Any) -> Iterator[None]:
    """While it is open, `gather_for_metrics` of the trainer's accelerator gathers nothing and notes what it was given.

    What `gather` and `reduce` return may be a part of the loss. Alone a rank would get another one, so they raise.
    """
    accelerator = trainer.accelerator
    trainer._gathered = []  # a figure: `undo.Snapshot` keeps what failed attempts noted out of it

    def note(value: Any, *args: Any, **kwargs: Any) -> Any:
        plain = torch.is_tensor(value) and value.numel() == 1
        trainer._gathered.append(value.item() if plain else None)
        return value

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise UsageError(
            f"{type(trainer).__name__} does not cover a loss that gathers from other processes: gather what is only "
            "logged by gather_for_metrics, or take the stock class"
        )

    accelerator.gather_for_metrics, accelerator.gather, accelerator.reduce = note, refuse, refuse
    try:
        yield
    finally:
        del accelerator.gather_for_metrics, accelerator.gather, accelerator.reduce


def agree_with_figures(trainer: Any, at: str, times: int, **said: Any) -> list[dict[str, Any]]:
    """An agreement of the ranks at which figures become those of all of them.

    As the stock class has them, where each rank ran its micro-batches as they came. Where one cut them, its pieces are
    no longer one by one the others': then each micro-batch of the step has its mean over tokens. Figures of other
    trainers, and of a script's own, stay those of each rank.

    Args:
        times: micro-batches of the work that was done.
    """
    mode = "train" if trainer.model.training else "eval"
    rows = _rows(trainer, mode)
    told = rows if len(rows) == times else [_total(rows)] if rows else []
    votes: list[dict[str, Any]] = trainer._ranks.agree(at, figures=told, pieces=len(rows), **said)
    if all(vote["figures"] for vote in votes):
        _put_together(trainer, mode, votes, rows, times)
    return votes


def _rows(trainer: Any, mode: str) -> list[Row]:
    """What was noted, piece by piece; none where it is not what is known."""
    metrics = getattr(trainer, "_metrics", {}).get(mode, {})
    noted = trainer._gathered
    width = 3 + (mode == "train") + bool(getattr(trainer, "aux_loss_enabled", False))
    if not set(metrics) >= set(_RATIOS) or None in noted or len(noted) % width:
        return []
    return [noted[start : start + width] for start in range(0, len(noted), width)]


def _total(rows: Sequence[Row]) -> Row:
    return [sum(column) for column in zip(*rows, strict=True)]


def _put_together(trainer: Any, mode: str, votes: list[dict[str, Any]], own: list[Row], times: int) -> None:
    shares: list[list[Row]] = [vote["figures"] for vote in votes]
    whole = all(vote["pieces"] == times for vote in votes)
    # One entry a micro-batch, of all ranks' rows.
    entries = list(zip(*shares, strict=True)) if whole else [tuple(_total(share) for share in shares)] * times
    metrics, heard = trainer._metrics[mode], _heard(trainer, len(votes))
    for name, column in _RATIOS.items():
        del metrics[name][-len(own) :]
        metrics[name] += [_ratio(_sum(entry[:heard], column), _sum(entry[:heard], 0)) for entry in entries]
    if getattr(trainer, "aux_loss_enabled", False):
        del metrics["aux_loss"][-len(own) :]
        pieces = [1] * len(votes) if whole else [vote["pieces"] for vote in votes]
        for entry in entries:
            means = [row[-1] / count for row, count in zip(entry, pieces, strict=True)]
            metrics["aux_loss"].append(torch.tensor(means[:heard]).mean().item())
    if mode == "train":
        trainer._total_train_tokens += sum(row[_TOKENS] for share in shares[:heard] for row in share)
        trainer._total_train_tokens -= sum(row[_TOKENS] for row in own)
        metrics["num_tokens"] = [trainer._total_train_tokens]


def _heard(trainer: Any, ranks: int) -> int:
    """How many ranks `gather_for_metrics` listens to: with an epoch's last batch it takes one from each for a row."""
    state = trainer.accelerator.gradient_state
    rest: int = state.remainder if state.end_of_dataloader else 0
    return min(ranks, rest) if rest > 0 else ranks


def _sum(rows: Sequence[Row], column: int) -> torch.Tensor:
    return torch.tensor([row[column] for row in rows]).sum()


def _ratio(value: torch.Tensor, count: torch.Tensor) -> float:
    return (value / count).item() if count > 0 else 0.0
