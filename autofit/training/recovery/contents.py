"""What data hold, as a hash; looking changes neither them nor any random number."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import random
import select
import signal
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

# Rows of a list, and bytes of them, that are looked at; of a data set that makes its rows, the rows.
_MOST_ROWS = 200_000
_MOST_BYTES = 2**31
_PLACES = 200
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
# So long all of them may take.
_SECONDS = 10.0
_GIVEN = (torch.Tensor, np.ndarray, Dataset, type, types.FunctionType, types.ModuleType)
_LARGE = 1000


def hash_rows(rows: Sequence[Any]) -> str:
    """Of the rows of a list, in their order; of a large one evenly spread ones."""
    found = _Contents()
    if rows:
        found.add(rows[0])
        stride = max(1, len(rows) // _MOST_ROWS, found.bytes * len(rows) // _MOST_BYTES)
        for place in range(stride, len(rows), stride):
            found.add(rows[place])
    return found.hash.hexdigest()


def hash_made_rows(dataset: Any) -> str | None:
    """Of some rows of a data set with `__getitem__` and a length; read in a fork, so that it stays as it is.

    None where one of them is another each time, cannot be had or takes long: then nothing is known of the others
    either. None also where the data set holds what a fork would share, as an open file and its place.
    """

    def read() -> str | None:
        _Portable(io.BytesIO()).dump(dataset)
        torch.default_generator.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        found = _Contents()
        for place in range(0, len(dataset), -(-len(dataset) // _PLACES)):
            once, again = _Contents(), _Contents()
            once.add(dataset[place])
            again.add(dataset[place])
            if once.hash.digest() != again.hash.digest():
                return None
            found.update(once.hash.digest())
        return found.hash.hexdigest()

    return _in_a_fork(read)


class _Contents:
    """The hash of values: tensors and arrays by their bytes, containers by what they hold."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.bytes = 0

    def update(self, data: Any) -> None:
        self.hash.update(data)
        self.bytes += len(data)

    def add(self, value: Any) -> None:
        if isinstance(value, (*_PLAIN, np.generic)):
            self._say(repr(value))
        elif torch.is_tensor(value):
            self._say(f"tensor {value.dtype} {tuple(value.shape)}")
            self.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            self._say(f"array {value.dtype.str} {value.shape}")
            self.update(value.tobytes())
        elif isinstance(value, Mapping):
            self._say(f"mapping {len(value)}")
            for name, inner in value.items():
                self._say(repr(name))
                self.add(inner)
        elif isinstance(value, (list, tuple, np.ndarray)):
            self._add_all(value)
        elif hasattr(value, "tobytes"):  # an image, say
            self._say(type(value).__qualname__)
            self.update(value.tobytes())
        else:
            self._say(type(value).__qualname__)  # not its repr, which may be an address
            self.add(dict(getattr(value, "__dict__", {})))

    def _add_all(self, values: Any) -> None:
        kinds = set(map(type, values))
        if kinds.issubset(_PLAIN):  # tokens, so many that going through them takes long
            self._say(repr(list(values)))
            return
        self._say(f"list {len(values)}")
        for inner in values:
            self.add(inner)

    def _say(self, words: str) -> None:
        self.update(f"{words}\n".encode())


class _Portable(pickle.Pickler):
    """Takes values, and what is defined in a function, as given."""

    def persistent_id(self, value: Any) -> int | None:
        large = isinstance(value, (*_PLAIN, list, tuple, dict)) and _length(value) > _LARGE
        return id(value) if large or isinstance(value, _GIVEN) else None


def _in_a_fork(work: Callable[[], str | None]) -> str | None:
    """What a fork finds out within `_SECONDS`; None where it finds nothing, or there are no forks.

    Whatever it draws, counts or keeps is lost with it.
    """
    if sys.platform != "linux":
        return None
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which loaders do not mind either
        child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)  # those of OpenMP are not in the fork
            os.write(writing, (work() or "").encode())
        os._exit(0)
    os.close(writing)
    try:
        ready = select.select([reading], [], [], _SECONDS)[0]
        return os.read(reading, _LARGE).decode() or None if ready else None
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 0
