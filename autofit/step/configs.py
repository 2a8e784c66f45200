"""A model's config: of a folder, of the hub or of those that ship, and whether a model can be made of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from autofit.errors import UsageError
from autofit.space.models import hub_id, known_model, known_name
from autofit.space.source import ModelSource
from autofit.step.data_access import did_you_mean, hub_error, is_hub_id, one_line

# Far beyond every model there is, and far below what makes a tensor's size overflow.
_MOST = {
    "vocab_size": 2**26,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 2**13,
    "n_layer": 2**13,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "num_experts": 2**16,
    "num_local_experts": 2**16,
    "n_routed_experts": 2**16,
    "num_experts_per_tok": 2**16,
    "moe_intermediate_size": 2**22,
}
_GROUPS = "num_key_value_heads"
_HEAD_DIMS = ("head_dim", "qk_nope_head_dim", "attention_head_size", "attention_head_dim", "kv_channels", "d_kv")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def load_config(source: ModelSource) -> PreTrainedConfig:
    """The model's config, checked.

    A folder's own. Else, where no real weights are needed, the shipped one of a known model that is not in the hub's
    cache: no network is asked. Else the hub's.

    Raises:
        UsageError: a folder that is missing or without config.json, a config that transformers rejects, sizes that
            make no model, remote code without leave, or a name that has no weights where they are needed.
        AccessError: the hub's model is gated, missing or out of reach.
    """
    folder = Path(source.model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"model {source.model}: the folder has no config.json")
        config = _read(source, str(folder))
    elif folder.exists() or not is_hub_id(source.model):
        raise UsageError(f"model {source.model} is no folder{did_you_mean(folder)}")
    else:
        config = _shipped(source) or _read(source, source.model)
    check_config(config, source.model, source.trust_remote_code)
    return config


def is_bare_name(model: str) -> bool:
    """Whether this names a shipped config and nothing else: no folder, and no repository on the hub."""
    return "/" not in model and known_name(model) is not None and not Path(model).expanduser().exists()


def require_weights(source: ModelSource) -> None:
    """Refuses the bare name of a shipped config where real weights are needed.

    Raises:
        UsageError: it says where the weights are.
    """
    if not source.random_weights and is_bare_name(source.model):
        where = hub_id(known_name(source.model) or "")
        raise UsageError(
            f"model {source.model} is known by its shapes, without weights: give {where} or a folder, "
            "or random weights to measure"
        )


def check_config(config: PreTrainedConfig, model: str, trust_remote_code: bool = False) -> None:
    """Refuses what transformers takes without a word and what could never run.

    Raises:
        UsageError: no causal language model; a size that is no positive number or beyond any model; heads that do not
            divide; more experts per token than experts; a padding token outside the vocabulary; a share outside 0 to
            1; weights quantized by anything but bitsandbytes.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not trust_remote_code:
        raise UsageError(f"model {model}: {type(config).__name__} makes no causal language model")
    text = config.get_text_config(decoder=True)
    if not isinstance(text, PreTrainedConfig):
        raise UsageError(f"model {model}: text_config is no config of {type(config).__name__}'s kind")
    for find_wrong in (_wrong_size, _wrong_heads, _wrong_experts, _wrong_values):
        wrong = find_wrong(text)
        if wrong is not None:
            raise UsageError(f"model {model}: {wrong}")
    quantized_bits(config, model)


def quantized_bits(config: PreTrainedConfig, model: str) -> int | None:
    """The bits that a checkpoint is already quantized to: 4, 8, or None where it is not.

    Raises:
        UsageError: it is quantized by something that cannot be trained here.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    values = settings if isinstance(settings, dict) else settings.to_dict()
    bits = {
        4: values.get("load_in_4bit") or values.get("_load_in_4bit"),
        8: values.get("load_in_8bit") or values.get("_load_in_8bit"),
    }
    kind = values.get("bnb_4bit_quant_type", "fp4")
    if bits[4] and kind not in ("nf4", "fp4"):
        raise UsageError(f"model {model}: bnb_4bit_quant_type {kind!r} is neither nf4 nor fp4")
    if bits[4] or bits[8]:
        return 4 if bits[4] else 8
    method = values.get("quant_method", "an unknown method")
    raise UsageError(
        f"model {model}: the checkpoint is quantized by {method}; only bitsandbytes' 4 and 8 bits can be trained here"
    )


def _wrong_size(config: PreTrainedConfig | SimpleNamespace) -> str | None:
    for name, most in _MOST.items():
        size = _get(config, name)
        if isinstance(size, int) and not 1 <= size <= most:
            return f"{name} {size} is no size of a model; valid is 1 to {most}"
    return None


def _wrong_heads(config: PreTrainedConfig) -> str | None:
    hidden, heads, groups = (_get(config, name) for name in ("hidden_size", "num_attention_heads", _GROUPS))
    if not isinstance(heads, int):
        return None
    if isinstance(groups, int) and heads % groups:
        return f"num_attention_heads {heads} is not divisible by {_GROUPS} {groups}"
    own_dims = any(_get(config, name) is not None for name in _HEAD_DIMS)
    if isinstance(hidden, int) and hidden % heads and not own_dims and _divides_by_default(config):
        return f"hidden_size {hidden} is not divisible by num_attention_heads {heads}, and there is no head_dim"
    dim, rope = _get(config, "head_dim"), _get(config, "rope_parameters")
    # Rotary embeddings turn pairs; where only a part of a head turns, its builder decides.
    if isinstance(dim, int) and dim % 2 and isinstance(rope, dict) and rope.get("partial_rotary_factor", 1) == 1:
        return f"head_dim {dim} is odd, and rotary embeddings turn pairs"
    return None


def _divides_by_default(config: PreTrainedConfig) -> bool:
    """Whether the architecture's own defaults keep the rule; some cut their heads otherwise and break it."""
    try:
        plain = type(config)()
    except Exception:  # some classes have no defaults
        return False
    return _get(plain, "hidden_size") % _get(plain, "num_attention_heads") == 0


def _wrong_experts(config: PreTrainedConfig) -> str | None:
    chosen = _get(config, "num_experts_per_tok")
    experts = next((n for n in (_get(config, name) for name in _EXPERTS) if isinstance(n, int)), None)
    if isinstance(chosen, int) and experts is not None and chosen > experts:
        return f"num_experts_per_tok {chosen} is more than its {experts} experts"
    return None


def _wrong_values(config: PreTrainedConfig) -> str | None:
    padding, rows = _get(config, "pad_token_id"), _get(config, "vocab_size")
    # One past the end is some models' extra row (musicgen); where it is not, building the embedding says so.
    if isinstance(padding, int) and isinstance(rows, int) and padding > rows:
        return f"pad_token_id {padding} is outside the vocabulary of {rows}"
    for name, value in vars(config).items():
        if name.endswith(("dropout", "pdrop")) and isinstance(value, int | float) and not 0 <= value <= 1:
            return f"{name} {value} is no share; valid is 0 to 1"
    return None


def _get(config: PreTrainedConfig | SimpleNamespace, name: str) -> Any:
    """A config's value; None where it has none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' answer where layers differ
        return None


def _shipped(source: ModelSource) -> PreTrainedConfig | None:
    """The shipped config, where weights are made up and the hub's own config is not already here."""
    require_weights(source)
    values = known_model(source.model)
    if values is None or not source.random_weights:
        return None
    if not is_bare_name(source.model) and isinstance(try_to_load_from_cache(source.model, "config.json"), str):
        return None
    return AutoConfig.for_model(**values)


def _read(source: ModelSource, where: str) -> PreTrainedConfig:
    wrong = _wrong_file_size(Path(where) / "config.json")
    if wrong is not None:
        raise UsageError(f"model {source.model}: {wrong}")
    try:
        return AutoConfig.from_pretrained(where, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # a config class may raise anything on values that it did not expect
        access = hub_error("model", source.model, error)
        if access is not None:
            raise access from error
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"model {source.model} brings its own code, which runs only if you allow it with --trust-remote-code "
                "(trust_remote_code: true in a config file)"
            ) from error
        raise UsageError(f"model {source.model}: transformers rejects its config: {one_line(error)}") from error


def _wrong_file_size(file: Path) -> str | None:
    """The wrong size in a config file, found before a class is made of it.

    Config classes divide by the heads and write lists as long as the layers: 10⁹ layers would fill the memory.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # none here, or transformers says what is wrong with it
        return None
    levels = [values, values.get("text_config")] if isinstance(values, dict) else []
    found = (_wrong_size(SimpleNamespace(**level)) for level in levels if isinstance(level, dict))
    return next((wrong for wrong in found if wrong is not None), None)
