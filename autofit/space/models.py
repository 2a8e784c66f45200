"""The configs of well-known models, shipped as facts: an estimate of one needs neither the hub nor a file.

`models.json` holds, by name, what `transformers.AutoConfig.for_model` needs: everything that decides a shape, a mask or
a head's arithmetic, where it differs from the config class's own default. Left out is what only real weights notice:
token ids, and the long-context frequencies of phi-4-mini. Gemma 3 from 4B on is its language model, without the vision
tower. Positions are the base model's where base and instruct differ (Qwen 2.5: its instruct models go to 32,768).
"""

from __future__ import annotations

import copy
import difflib
import json
from importlib.resources import files
from typing import Any

_FACTS: dict[str, dict[str, Any]] = json.loads(files("autofit.space").joinpath("models.json").read_text("utf-8"))
MODELS: tuple[str, ...] = tuple(_FACTS)


def _spellings() -> dict[str, str]:
    """Our name by everything a model is called: the name, its ids on the hub, and their last parts."""
    table = {name: name for name in MODELS}
    for name, facts in _FACTS.items():
        for alias in facts["aliases"]:
            last = alias.rpartition("/")[2]
            # Mirrors with the official files; people who have no access to gated ones use them.
            table.update({spelling.lower(): name for spelling in (alias, last, f"unsloth/{last}")})
    return table


_BY_SPELLING = _spellings()


def known_name(model: str) -> str | None:
    """Our name of a model, given as that, as its id on the hub (base or instruct) or as that id without its owner.

    Case does not matter. None for a model whose config does not ship.
    """
    return _BY_SPELLING.get(model.strip().lower())


def known_model(model: str) -> dict[str, Any] | None:
    """The config of a known model, `model_type` included, as a dict of JSON types; None where it does not ship."""
    name = known_name(model)
    return None if name is None else copy.deepcopy(_FACTS[name]["config"])


def hub_id(name: str) -> str:
    """Where the weights of one of `MODELS` are, on the hub (the base model's, or the only one)."""
    return next(alias for alias in _FACTS[name]["aliases"] if "/" in alias)


def near_models(model: str) -> list[str]:
    """Names of `MODELS` that a misspelt one may have meant, best first, at most three."""
    return difflib.get_close_matches(model.rpartition("/")[2].lower(), MODELS, n=3, cutoff=0.6)
