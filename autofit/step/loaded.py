"""Whether a base was read whole: transformers makes up what its files lack, and says so only in a log."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from autofit.errors import UsageError


def check_loaded(name: str, model: nn.Module, info: Mapping[str, Collection[Any]]) -> None:
    """Looks at what `from_pretrained` says of the weights, with `output_loading_info` and `ignore_mismatched_sizes`.

    An adapter on weights that were made up fits no other copy of the base.

    Raises:
        UsageError: a parameter is not in the files, or has another shape there.
    """
    other = sorted(info["mismatched_keys"])
    if other:
        key, there, asked = other[0]
        shapes = f"is {'×'.join(map(str, there))}, and {'×'.join(map(str, asked))} in its config.json"
        raise UsageError(f"model {name}: its weights are of another model: {key} {shapes}{_more(other)}")
    missing = [key for key, _ in model.named_parameters() if key in info["missing_keys"]]
    if missing:
        raise UsageError(
            f"model {name}: its weights lack {missing[0]}{_more(missing)}: a file is missing, or config.json is of "
            "another model; --random-weights makes all of them up, to measure"
        )


def _more(found: Collection[Any]) -> str:
    return f" ({len(found) - 1} more like it)" if len(found) > 1 else ""
