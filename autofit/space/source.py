"""Where the base model comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A folder or hub id, and whether its weights are read or made up."""

    model: str
    random_weights: bool = False
    trust_remote_code: bool = False
