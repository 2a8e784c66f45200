"""What a script's own classes hold besides tensors of the model: counters, states between batches, generators."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from autofit.errors import OutOfBudget

# Modules of these keep nothing from one pass to the next but in buffers.
_KNOWN = ("torch.", "transformers.", "peft.", "trl.", "accelerate.", "bitsandbytes.", "torchvision.", "timm.")
_OF_ANY_MODULE = vars(nn.Module()).keys()
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, np.ndarray, list, dict)
# Of containers so many values; of larger ones their length. Tensors up to so many values, of others their version.
_MOST = 1000
_LARGEST = 2**20


def is_own(value: Any) -> bool:
    """Whether it is of a class that a script brings along."""
    return not f"{type(value).__module__}.".startswith(_KNOWN)


class Attributes:
    """The attributes of some objects at one moment.

    Args:
        owners: with the names that are left as they are; none for those that every module has.
    """

    def __init__(self, owners: Iterable[tuple[Any, Any]]) -> None:
        self._kept = []
        for owner, others in owners:
            found = vars(owner)
            names = found.keys() - (others or _OF_ANY_MODULE)
            self._kept.append(
                (owner, others or _OF_ANY_MODULE, {name: (found[name], _kept(found[name])) for name in names})
            )

    def restore(self) -> None:
        """The same objects, as they were.

        Raises:
            OutOfBudget: one of which no copy was kept has changed.
        """
        for owner, left, kept in self._kept:
            found = vars(owner)
            for name in [n for n in found if n not in kept and n not in left and isinstance(found[n], _PLAIN)]:
                del found[name]
            for name, (value, copy) in kept.items():
                found[name] = value
                if not _put_back(value, copy):
                    what = f"{type(owner).__name__}.{name}"
                    raise OutOfBudget(
                        f"{what} changes in the forward pass and is not kept: again it would change twice"
                    )


def _kept(value: Any) -> Any:
    if torch.is_tensor(value):
        return value._version if value.numel() >= _LARGEST else value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy() if value.size < _LARGEST else None
    if isinstance(value, (list, dict)):
        inner = value.values() if isinstance(value, dict) else value
        if len(value) > _MOST or any(isinstance(one, (list, dict)) for one in inner):
            return len(value)
        return [*value.items()] if isinstance(value, dict) else [*value]
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    return value.bit_generator.state if isinstance(value, np.random.Generator) else None


def _put_back(value: Any, kept: Any) -> bool:
    """Whether it is again as it was."""
    if torch.is_tensor(value):
        if isinstance(kept, int):
            return value._version == kept
        value.data.copy_(kept)
    elif isinstance(value, np.ndarray) and kept is not None:
        value[...] = kept
    elif isinstance(value, list):
        value[kept if isinstance(kept, int) else 0 :] = [] if isinstance(kept, int) else kept
    elif isinstance(value, dict):
        if isinstance(kept, int):
            return len(value) == kept
        value.clear()
        value.update(kept)
    elif isinstance(value, torch.Generator):
        value.set_state(kept)
    elif isinstance(value, random.Random):
        value.setstate(kept)
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = kept
    return True
