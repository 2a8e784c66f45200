"""A run's folder: what stands where, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from autofit import __version__
from autofit.errors import UsageError

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "optuna", "trl")


class Workspace:
    """The folder of one run.

    resolved.yaml, plan.json, trials.jsonl, metrics.jsonl, events.jsonl, env.json, checkpoint-*/, adapter/, base/
    (embedded model only), README.md, report.html are for people; study.journal (the trials) and work/ (the trials'
    records, the prepared data and tokenizer) are what an interrupted run goes on from.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end; the model card is written last."""
        return (self.folder / "README.md").is_file()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes from this folder, where the platform can.

        Raises:
            UsageError: another one has it.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "lock").open("w") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:  # Windows
                pass
            except OSError as error:
                raise UsageError(f"output-dir {self.folder}: another autofit is running in it") from error
            yield

    def event(self, name: str, **details: Any) -> None:
        """Appends a line to events.jsonl."""
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": name, **details})
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes a JSON file, whole or not at all."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_yaml(self, name: str, content: dict[str, Any]) -> None:
        """Writes a YAML file, whole or not at all."""
        self.write_text(name, yaml.safe_dump(content, sort_keys=False))

    def write_text(self, name: str, content: str) -> None:
        """Writes a text file, whole or not at all."""
        beside = self.folder / f".{name}.tmp"
        beside.write_text(content, encoding="utf-8")
        os.replace(beside, self.folder / name)


def choose_folder(asked: str | None) -> Path:
    """The folder a run goes to: a new one under autofit-runs/, or the one asked for (which may hold a run to go on).

    Raises:
        UsageError: it is a file, holds something else, or a finished run.
    """
    if asked is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        names = [stamp, *(f"{stamp}-{i}" for i in range(2, 100))]
        return next(path for name in names if not (path := Path("autofit-runs") / name).exists()).absolute()
    folder = Path(asked).absolute()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output-dir {asked} is a file; name a folder that is new, empty or holds a run")
    if folder.is_dir() and any(folder.iterdir()):
        if not any((folder / name).is_file() for name in ("resolved.yaml", "study.journal", "work/lock")):
            raise UsageError(f"output-dir {asked} is not empty and holds no run of autofit; name another")
        if Workspace(folder).finished:
            raise UsageError(f"output-dir {asked} holds a finished run; name another or remove it")
    return folder


class Staging:
    """A folder beside the run's, for what is not yet known to be good. Gone when left, unless `publish` moved it."""

    def __init__(self, target: Path) -> None:
        self.target = target
        existing = next(p for p in target.parents if p.is_dir())
        self._made = [p for p in target.parents if not p.exists()]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        except OSError as error:
            raise UsageError(f"output-dir {target}: cannot write in {existing}: {error.strerror}") from error

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self._made:
            # Only what this run made and nobody used since.
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()

    def publish(self) -> None:
        """Moves what was staged into the run's folder; what an earlier start of this run left there is replaced."""
        self.target.mkdir(exist_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir() and (self.target / path.name).is_dir():
                for inner in path.iterdir():
                    _replace(inner, self.target / path.name / inner.name)
            else:
                _replace(path, self.target / path.name)


def _replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(source, target)


def environment() -> dict[str, Any]:
    """Versions and platform, for env.json. Asks the package metadata; imports nothing."""
    return {
        "autofit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def other_autofit() -> bool:
    """Whether the distribution `autofit` of PyPI, another project, is installed: both bring a package of that name."""
    return _version("autofit") is not None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
