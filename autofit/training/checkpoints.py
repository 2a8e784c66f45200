"""Checkpoints that are whole or absent: written beside, synced, listed with their hashes, renamed; checked before use.

A checkpoint is a folder `checkpoint-<step>` with the stock Trainer's files. Ours has `manifest.json` besides: the bytes
and hash of every file, and what the saver says about it. Nothing here unpickles anything.

Beside the checkpoints there may be `_saving` (one that is being written, or was when the process ended),
`_replaced-checkpoint-<step>` (for the moment in which another takes its name), `_removed-checkpoint-<step>` (for the
moment in which it goes) and `_broken-checkpoint-<step>`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from autofit.errors import AutofitError
from autofit.space.units import format_bytes

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
STAGING = "_saving"
_REPLACED = "_replaced-"
_BROKEN = "_broken-"
_REMOVED = "_removed-"
_NAME = re.compile(r"checkpoint-(\d+)")
# The Trainer pickles its arguments into it, and never reads it again; neither do we.
_UNREAD = "training_args.bin"
_FEWEST = 2


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 for any other path."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def require_space(folder: Path, needed_bytes: int) -> None:
    """Looks at the disk before anything is written to it.

    Raises:
        AutofitError: it has less room than that; with both sizes.
    """
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise AutofitError(
            f"{folder}: a checkpoint needs {format_bytes(needed_bytes)} of disk, {format_bytes(free)} are free"
        )


def stage(folder: Path) -> Path:
    """An empty folder beside the checkpoints of `folder`; what a killed process left of one is gone."""
    staging = folder / STAGING
    clear(folder)
    staging.mkdir(parents=True)
    return staging


def clear(folder: Path) -> None:
    """Removes a checkpoint that has not become one, and what is left of those that were removed."""
    for left in (folder / STAGING, *folder.glob(f"{_REMOVED}checkpoint-*")):
        if left.exists():
            shutil.rmtree(left)


def publish(staged: Path, final: Path, facts: dict[str, Any]) -> None:
    """Makes a written folder the checkpoint `final`, in one step that survives a loss of power.

    Args:
        facts: JSON, to be had again from `facts_of`.

    Raises:
        OSError: the disk does not take it; `final` is what it was.
    """
    torn = list(_torn(staged, checksums=False))  # not every writer says when the disk is full
    if torn:
        raise OSError(f"{torn[0]}, as soon as it was written")
    files = {path.relative_to(staged).as_posix(): _synced(path) for path in _files(staged)}
    listed = {"version": 1, "facts": facts, "files": files}
    manifest = staged / MANIFEST
    manifest.write_text(json.dumps({**listed, "sha256": _hash_of(listed)}, indent=1) + "\n", encoding="utf-8")
    _synced(manifest)
    for folder in (*(path for path in staged.rglob("*") if path.is_dir()), staged):
        _sync_folder(folder)
    replaced = final.with_name(_REPLACED + final.name)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    try:
        os.rename(staged, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    _sync_folder(final.parent)
    _sync_folder(final.parent.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def facts_of(checkpoint: Path) -> dict[str, Any] | None:
    """What its saver said about a whole checkpoint; None for the stock Trainer's."""
    if not (checkpoint / MANIFEST).is_file():
        return None
    facts: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["facts"]
    return facts


def verify(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, file by file; empty where it is whole.

    Reads all of it, once in this process for as long as no file is touched: a run that goes on asks several times.
    """
    if not checkpoint.is_dir():
        return ["it is no folder"]
    stamp = _stamp(checkpoint)
    if _whole.get(checkpoint.absolute()) == stamp:
        return []
    listed = (checkpoint / MANIFEST).is_file()
    wrong = list(_against_manifest(checkpoint, hashes=True) if listed else _as_stock(checkpoint))
    if not wrong:
        _whole[checkpoint.absolute()] = stamp
    return wrong


# Checkpoints that were found whole, as their files were then.
_whole: dict[Path, list[tuple[str, int, int, int]]] = {}


def _stamp(checkpoint: Path) -> list[tuple[str, int, int, int]]:
    """Of each file its name, inode, size and when it was last changed."""
    found = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    states = [(path, path.stat()) for path in found]
    return [(path.name, state.st_ino, state.st_size, state.st_ctime_ns) for path, state in states]


def newest_whole(folder: Path, on_broken: Callable[[Path, list[str]], None] | None = None) -> Path | None:
    """The checkpoint of the highest step that is whole; None where there is none.

    Args:
        on_broken: told of each newer one, and what is wrong with it.
    """
    for checkpoint in sorted(_checkpoints(folder), key=step_of, reverse=True):
        wrong = verify(checkpoint)
        if not wrong:
            return checkpoint
        if on_broken is not None:
            on_broken(checkpoint, wrong)
    return None


def recover(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint, after broken ones were set aside; for the one process that trains in the folder.

    Args:
        warn: told, in a line, of each that was set aside.
    """

    def set_aside(checkpoint: Path, wrong: list[str]) -> None:
        aside = checkpoint.with_name(_BROKEN + checkpoint.name)
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint, aside)
        warn(f"{checkpoint} is broken and was set aside as {aside.name}: {'; '.join(wrong)}")

    for replaced in folder.glob(f"{_REPLACED}checkpoint-*"):
        # A process was ended between the two renames of `publish`.
        final = replaced.with_name(replaced.name.removeprefix(_REPLACED))
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(replaced, final)
    return newest_whole(folder, set_aside)


def prune(folder: Path, keep: int, protected: Iterable[Path]) -> None:
    """Removes the oldest checkpoints beyond `keep`, and never one of the last two that look whole.

    Age is that of the files: the folder may hold an earlier run's higher steps.
    """
    spared = {path.absolute() for path in protected}
    oldest_first = sorted(_checkpoints(folder), key=lambda path: (path.stat().st_mtime_ns, step_of(path)))
    whole = [path for path in oldest_first if _looks_whole(path)]
    excess = len(whole) - max(keep, _FEWEST)
    for checkpoint in whole:
        if excess <= 0:
            return
        if checkpoint.absolute() not in spared:
            # Half removed, it must not look like a checkpoint with fewer files.
            removed = checkpoint.with_name(_REMOVED + checkpoint.name)
            os.rename(checkpoint, removed)
            shutil.rmtree(removed, ignore_errors=True)
            excess -= 1


def _checkpoints(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("checkpoint-*") if step_of(path) >= 0 and path.is_dir())


def _looks_whole(checkpoint: Path) -> bool:
    """Without reading what is large in it."""
    if (checkpoint / MANIFEST).is_file():
        return not any(_against_manifest(checkpoint, hashes=False))
    return (checkpoint / STATE).is_file()


def _against_manifest(checkpoint: Path, hashes: bool) -> Iterator[str]:
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        intact = listed.pop("sha256") == _hash_of(listed)
        files = listed["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        intact, files = False, ()
    if not intact:
        yield f"{MANIFEST} is torn or has been changed"
        return
    for name, expected in files:
        path = checkpoint / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != expected["bytes"]:
            yield f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        elif hashes and _hash_file(path) != expected["sha256"]:
            yield f"{name} is not what was written"


def _as_stock(checkpoint: Path) -> Iterator[str]:
    """The stock Trainer writes its state last, and leaves no hashes: but archives and headers tell what is torn."""
    if not any(path.name.startswith(("model", "adapter_model", "pytorch_model")) for path in _files(checkpoint)):
        yield "it has no weights"
    try:
        json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        yield f"{STATE} is missing or torn"
    yield from _torn(checkpoint, checksums=True)


def _torn(folder: Path, checksums: bool) -> Iterator[str]:
    for path in _files(folder):
        if path.suffix == ".safetensors":
            whole = _is_safetensors(path)
        else:
            whole = path.suffix not in (".pt", ".pth", ".bin") or path.name == _UNREAD
            whole = whole or (_is_archive(path) if checksums else zipfile.is_zipfile(path))
        if not whole:
            yield f"{path.relative_to(folder).as_posix()} is torn"


def _is_safetensors(path: Path) -> bool:
    """Whether a header says what follows it: 8 bytes of its length, JSON, and data up to the last offset."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return False
    return 8 + length + max(ends, default=0) == path.stat().st_size


def _is_archive(path: Path) -> bool:
    """Whether every record of a file of `torch.save` has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, NotImplementedError):
        return False


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _synced(path: Path) -> dict[str, Any]:
    """Brings a file to the disk itself; returns its bytes and hash."""
    about = {"bytes": path.stat().st_size, "sha256": _hash_file(path)}
    with path.open("r+b") as file:
        os.fsync(file.fileno())
    return about


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(number)


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
