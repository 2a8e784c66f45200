"""Several processes that train together: what they tell each other, and how long one waits for another."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from autofit.errors import BY_NAME, AutofitError, OutOfBudget

# Bytes of a vote besides what grows with the model and the accumulation: a path, or why a rank gives up.
_VOTE_BYTES = 8192
# Bytes of one micro-batch's figures.
_FIGURES_BYTES = 128
_MOST_WORDS = 300
# What gloo says among much else.
_OF_GLOO = ("connection closed by peer", "connection reset by peer", "timed out")
# So long a rank that leaves with an error waits until the others have heard of it.
_PARTING_SECONDS = 30.0


class Ranks:
    """The processes of one training, and this one's place among them.

    Between two agreements each rank is on its own: what it does again, or in smaller pieces, takes no collective. At an
    agreement all of them say where they are, whether they can go on, and what the others need to know. Whoever leaves
    with an error says so at the next agreement of the others, which end there, too: after an optimizer's step that did
    not fit on one rank that is the end of the same step, before anything is logged, evaluated or saved.

    A rank that was killed is noticed at once, by its connection; one that never arrives after `ddp_timeout` seconds.
    The votes go over a group of their own, on the host: they need no memory of the device, and can be waited for.

    Attributes:
        rank: this process's number.
        count: how many there are.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.rank: int = trainer.args.process_index
        self.count: int = trainer.args.world_size
        self._seconds = float(trainer.args.ddp_timeout)
        self._group: Any = None
        self._open = False
        self._over = False
        self._votes = np.zeros((0, 0), np.uint8)
        self._tensors: list[torch.Tensor] = []

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Around work that all ranks do and end together; within another one it is a part of that.

        Raises:
            OutOfBudget: this rank's, or another's; with the rank.
            AutofitError: another rank left, was killed or did not come.
        """
        if self._open:
            yield
            return
        try:
            self._begin()
            yield
            self.agree(f"the end of {what}")
        except BaseException as error:
            if self._over:
                raise  # all know
            if _is_of_connection(error):
                raise self._gone(what, error) from None
            self._leave(error)
            if isinstance(error, OutOfBudget):
                raise OutOfBudget(f"rank {self.rank}: {error}") from None
            raise
        finally:
            self._open = False

    def agree(self, at: str, **said: Any) -> list[dict[str, Any]]:
        """What every rank says, in their order; JSON. Alone, where nothing is done together, what this one says.

        Args:
            at: the place in the work. All have to be at the same.

        Raises:
            OutOfBudget: one of them gave up.
            AutofitError: one of them left, is gone or elsewhere.
        """
        if not self._open:
            return [said]
        try:
            work = self._vote({"at": at, **said})
            _wait(work, self._seconds + _PARTING_SECONDS)  # the group itself gives up before
        except RuntimeError as error:
            self._over = True
            raise self._gone(at, error) from None
        votes = [json.loads(bytes(vote)) for vote in self._votes[1:]]
        self._check(votes)
        return votes

    def of_first(self, at: str, text: str | None) -> str:
        """A text of the first rank, for all."""
        return str(self.agree(at, text=text)[0]["text"])

    def _begin(self) -> None:
        if self._group is None or self._over:
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=self._seconds))
        parameters = sum(1 for _ in self._trainer.model.parameters())
        figures = _FIGURES_BYTES * self._trainer.args.gradient_accumulation_steps
        room = _VOTE_BYTES + figures + parameters // 4 + 1
        # One's own, and all of them; made beforehand, for a vote must not need memory where there is none.
        self._votes = np.zeros((1 + self.count, room), np.uint8)
        self._tensors = [torch.from_numpy(vote) for vote in self._votes]
        self._open, self._over = True, False

    def _vote(self, said: dict[str, Any]) -> Any:
        self._votes[0] = np.frombuffer(json.dumps(said).encode().ljust(self._votes.shape[1]), np.uint8)
        return dist.all_gather(self._tensors[1:], self._tensors[0], group=self._group, async_op=True)

    def _check(self, votes: list[dict[str, Any]]) -> None:
        left = [(rank, vote["left"]) for rank, vote in enumerate(votes) if "left" in vote]
        left.sort(key=lambda one: one[1]["kind"] != OutOfBudget.__name__)
        if left:
            self._over = True
            rank, why = left[0]
            raise BY_NAME.get(why["kind"], AutofitError)(f"rank {rank}: {why['words']}")
        places = [vote["at"] for vote in votes]
        if len(set(places)) > 1:
            self._over = True
            where = ", ".join(f"rank {rank} is at {place}" for rank, place in enumerate(places))
            raise AutofitError(f"the ranks went different ways: {where}")

    def _leave(self, error: BaseException) -> None:
        """Tells the others, for as long as they may take to ask; after that they find the connection closed."""
        self._over = True
        ours = isinstance(error, AutofitError)
        words = " ".join(str(error).split()) if ours else f"left with {type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):
            _wait(self._vote({"left": {"kind": type(error).__name__, "words": words[:_MOST_WORDS]}}), _PARTING_SECONDS)

    def _gone(self, at: str, error: BaseException) -> AutofitError:
        known = [words for words in _OF_GLOO if words.lower() in str(error).lower()]
        why = known[0] if known else " ".join(str(error).split())[:_MOST_WORDS]
        return AutofitError(
            f"rank {self.rank}, at {at}: another rank was killed, or did not come within {self._seconds:.0f} seconds "
            f"(ddp_timeout): {why}; start all again with resume_from_checkpoint=True"
        )


def _wait(work: Any, seconds: float) -> None:
    """Looks again and again: within a wait of the library no signal would be heeded.

    Raises:
        RuntimeError: it failed, or took longer.
    """
    end, pause = time.monotonic() + seconds, 0.0
    while not work.is_completed():
        if time.monotonic() > end:
            raise RuntimeError("timed out")
        time.sleep(pause)
        pause = min(pause + 1e-5, 5e-3)
    work.wait()


def _is_of_connection(error: BaseException) -> bool:
    """Whether a collective of the stock loop failed because another rank is gone."""
    words = str(error).lower()
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in words)
