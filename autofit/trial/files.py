"""JSON files that are either whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

REQUEST = "request.json"
RESULT = "result.json"
PHASE = "phase.json"
STDOUT_TAIL = "stdout.txt"
STDERR_TAIL = "stderr.txt"

MAX_JSON_BYTES = 16 * 2**20


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Writes beside and renames, so that a reader sees the old content or the new, never a part.

    `durable` also syncs the file, so that a power cut cannot leave an empty one under the new name.

    Raises:
        OSError: the folder cannot be written or the disk is full; the old content then stands.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """`write_bytes` of a JSON document.

    Raises:
        OSError: as `write_bytes`.
        TypeError, ValueError: the value is not JSON.
    """
    write_bytes(path, json.dumps(value).encode(), durable=durable)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file, or its content is torn, huge or no object."""
    try:
        if path.stat().st_size > 2 * MAX_JSON_BYTES:
            return None
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
