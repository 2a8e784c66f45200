"""What an architecture is made of, read off its modules on meta tensors: no weights, a second or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from autofit.errors import UsageError
from autofit.space.facts import ModelFacts
from autofit.space.source import ModelSource
from autofit.step.configs import load_config, quantized_bits
from autofit.step.data_access import is_hub_id, one_line
from autofit.step.loss import supports_chunked_loss
from autofit.step.model import checkpointable_layers, empty_base
from autofit.step.packing import packed_head_size

_WEIGHTS = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")


def inspect_model(source: ModelSource) -> ModelFacts:
    """The facts of a model folder or hub id.

    Raises:
        UsageError: no config, a config that transformers rejects, or no causal language model.
    """
    config = load_config(source)
    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not causal:
        raise UsageError(f"model {source.model}: {type(config).__name__} is an encoder, not a causal language model")
    try:
        base, attention = _empty(config, source)
    except Exception as error:  # a model's constructor may raise anything on values that it did not expect
        raise UsageError(
            f"model {source.model}: {type(config).__name__} makes no causal language model: {one_line(error)}"
        ) from error
    base.tie_weights()
    parameters = sum(p.numel() for p in base.parameters())
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return ModelFacts(
        architecture=type(base).__name__,
        num_parameters=parameters,
        weight_bytes_16bit=2 * parameters,
        checkpointable_layers=len(checkpointable_layers(base)) if base.supports_gradient_checkpointing else 0,
        max_positions=positions if isinstance(positions, int) and positions > 0 else None,
        attention=attention,
        chunked_loss=supports_chunked_loss(base),
        packed_head_size=packed_head_size(base),
        quantized_bits=quantized_bits(config, source.model),
        download_bytes=0 if source.random_weights or _is_here(source.model) else 2 * parameters,
    )


def _empty(config: Any, source: ModelSource) -> tuple[Any, str]:
    """The base without storage, and the attention it can run: SDPA, or what the architecture has instead."""
    try:
        return empty_base(config, "bfloat16", "sdpa", source.trust_remote_code), "sdpa"
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return empty_base(config, "bfloat16", "eager", source.trust_remote_code), "eager"


def has_weights(model: str) -> bool:
    """Whether the weights are on disk: in the folder, or already in the hub's cache."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return any(file.name.endswith(_WEIGHTS) for file in folder.iterdir())
    return is_hub_id(model) and _is_cached(model)


def _is_here(model: str) -> bool:
    """Whether nothing has to be fetched: a folder, or already in the hub's cache."""
    return Path(model).is_dir() or _is_cached(model)


def _is_cached(model: str) -> bool:
    names = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(model, name), str) for name in names)
