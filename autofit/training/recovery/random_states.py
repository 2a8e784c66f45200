"""The generators that everybody draws from: torch's, Python's and NumPy's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class RandomStates:
    """How they are at one moment; on the host, and on this process's device."""

    def __init__(self) -> None:
        self._torch, self._random = torch.get_rng_state(), random.getstate()
        self._numpy: dict[str, Any] = np.random.get_state(legacy=False)
        # Of this process's device: asking all of them would put a context on each.
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        """As they were; more than once, if need be."""
        torch.set_rng_state(self._torch)
        random.setstate(self._random)
        np.random.set_state(self._numpy)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)

    def have_moved(self) -> bool:
        """Whether anyone has drawn from them since; also where a device has come into use."""
        return self._plain() != RandomStates()._plain()

    def _plain(self) -> tuple[Any, ...]:
        of_numpy = dict(self._numpy)
        inner = of_numpy.pop("state")
        numbers = [value.tobytes() if isinstance(value, np.ndarray) else value for value in inner.values()]
        of_cuda = None if self._cuda is None else self._cuda.numpy().tobytes()
        return self._torch.numpy().tobytes(), self._random, of_numpy, numbers, of_cuda
