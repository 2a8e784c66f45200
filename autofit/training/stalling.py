"""A training that says nothing any more: noticed, told, and in the end replaced by another process."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any

# A silence is told of, and ended, after so long; or after so many times the longest one before, if that is longer.
TOLD_SECONDS, TOLD_TIMES = 600.0, 10.0
ENDED_SECONDS, ENDED_TIMES = 1800.0, 30.0
# Between two looks no more than this counts: the machine, or the parent with its children, may have been asleep.
_MOST_BETWEEN_LOOKS = 5.0


class Stalled(Exception):
    """The training's process lives and does nothing."""


class Silence(StrEnum):
    """What is to be done about a silence."""

    TELL = "tell"
    END = "end"


class Listener:
    """Told again and again what a training's process said last; says when that is the same for too long.

    Args:
        clock: monotonic seconds.

    Attributes:
        seconds: how long it is the same already.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = 0.0
        self._clock = clock
        self._looked = clock()
        self._longest = 0.0
        self._word: Any = None
        self._told = False
        self._has_trained = False

    def hears(self, record: dict[str, Any]) -> Silence | None:
        """Takes in the phase's record as it stands; TELL comes once a silence, END for ever.

        A process that has not completed a step yet (a large model on a slow disk) is told of, never ended.
        """
        now = self._clock()
        self.seconds += min(now - self._looked, _MOST_BETWEEN_LOOKS)
        self._looked = now
        if record != self._word:
            # How long a start takes says nothing about steps.
            self._longest = max(self._longest, self.seconds) if self._has_trained else 0.0
            self._word, self._has_trained = dict(record), "step" in record
            self.seconds, self._told = 0.0, False
        if self._has_trained and self.seconds >= max(ENDED_SECONDS, ENDED_TIMES * self._longest):
            return Silence.END
        if not self._told and self.seconds >= max(TOLD_SECONDS, TOLD_TIMES * self._longest):
            self._told = True
            return Silence.TELL
        return None
