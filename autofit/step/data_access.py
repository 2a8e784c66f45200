"""Where a model or data set is looked for, and what to say where it is not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from autofit.errors import AccessError
from autofit.space.models import near_models

# A gated repository's error is one of the missing ones; so is a private one's, for who may not see it.
_REFUSED = (RepositoryNotFoundError, DatasetNotFoundError)
_UNREACHED = (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, TimeoutError)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_NAME = re.compile(r".*\.(jsonl?|csv|tsv|parquet|arrow|txt|ya?ml|gz|zip|safetensors|bin|gguf)", re.IGNORECASE)


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path here is one on the hub (`owner/name` or `name`) and not a misspelt path."""
    if not _HUB_ID.fullmatch(name) or _FILE_NAME.fullmatch(name):
        return False
    return "/" not in name or not Path(name).parent.is_dir()


def did_you_mean(path: Path) -> str:
    """What follows "… does not exist" for a missing path: the nearest name in the folder where it was looked for."""
    if not path.parent.is_dir():
        return f" (neither does {path.parent})"
    near = _nearest(path)
    return f"; did you mean {near}?" if near else f"; nothing in {path.parent.resolve()} is called like it"


def hub_error(kind: str, name: str, error: BaseException) -> AccessError | None:
    """What a failed load of the hub's `model` or `dataset` means, or None where access was not the matter."""
    causes = tuple(_chain(error))
    near = _nearest(Path(name))
    shapes = near_models(name) if kind == "model" and "/" not in name else []
    hint = f"; did you mean the path {near}?" if near else ""
    hint = hint or (f"; known by their shapes are {', '.join(shapes)}" if shapes else "")
    if any(isinstance(cause, _REFUSED) for cause in causes):
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
        return AccessError(
            f"{kind} {name} is gated, private or missing (and no path here): accept its licence at {page} "
            f"and log in with `hf auth login`{hint}"
        )
    if any(isinstance(cause, _UNREACHED) or _is_transport_error(cause) for cause in causes):
        asked = constants.HF_HUB_OFFLINE or any(isinstance(cause, OfflineModeIsEnabled) for cause in causes)
        why = "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set" if asked else "the hub cannot be reached"
        return AccessError(
            f"{kind} {name} is neither a path nor in the hub's cache here, and we are offline ({why}){hint}"
        )
    return None


def _is_transport_error(error: BaseException) -> bool:
    """Whether httpx says so, by name: the hub's client brings one or another major version of it."""
    return any(base.__name__ == "TransportError" for base in type(error).__mro__)


def first_line(error: BaseException) -> str:
    """An error's message in one line, for the end of our own."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """An error's whole message in one line of at most 200 characters, for errors that say in their second line what."""
    text = " ".join(str(error).split())
    return (text if len(text) <= 200 else f"{text[:199]}…") or type(error).__name__


def _nearest(path: Path) -> Path | None:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return path.parent / near[0] if near else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
