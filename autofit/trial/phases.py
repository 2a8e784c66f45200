"""What a trial says it is doing, on record while it does it: the record outlives a crash."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from autofit.trial import files

START = "start"


class PhaseReport:
    """Call it with the phase that begins and whatever numbers are known by then; `phase.json` then says so.

    Numbers stand until they are reported again. A call costs about 0.1 ms: it is not synced to disk, since only
    the process may die here, not the machine. A full disk loses the report, not the trial.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Without a path the record is only kept in memory."""
        self._path = path
        self._begun = time.monotonic()
        self.record: dict[str, Any] = {"phase": START}

    def __call__(self, phase: str, **numbers: Any) -> None:
        """Raises nothing for an unwritable file.

        Raises:
            TypeError: a number that is not JSON.
        """
        self.record.update(numbers)
        self.record["phase"] = phase
        self.record["phase_at_seconds"] = round(time.monotonic() - self._begun, 3)
        if self._path is not None:
            with contextlib.suppress(OSError):
                files.write_json(self._path, self.record, durable=False)
