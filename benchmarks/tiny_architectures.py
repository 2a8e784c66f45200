"""Every causal language model of transformers as a tiny model, from its own config class's defaults.

A rule a name: whatever an attribute is called decides what it shrinks to, in sub-configs too. What no rule can know
stands in `EXCEPTIONS`. Kinds of layers, ratios of heads and what is tied, biased, capped or routed stay as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ARCHITECTURES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 512
LAYERS = 2

# Fixed sizes. Inner sizes differ from the hidden size, so that a mix-up shows.
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embedding_size"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "lru_width", "attention_hidden_size", "backbone_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "dim_ff", "dff"), 96),
    **dict.fromkeys(("ffn_hidden_size", "d_inner", "d_ff", "mlp_dim", "feed_forward_size"), 96),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "n_inner"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "router_hidden_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_head", "dim_head", "v_head_dim", "qk_nope_head_dim", "d_kv", "kv_channels"), 16),
    **dict.fromkeys(("swa_head_dim", "attention_head_size", "global_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 24),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "adapter_rank", "hc_lowrank"), 16),
    **dict.fromkeys(("index_n_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "d_rel"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "codebook_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 256),
    **dict.fromkeys(("max_source_positions", "max_target_positions", "rel_extent", "model_max_length"), 256),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), 16),
    **dict.fromkeys(("local_attention", "index_topk", "attention_chunk_size"), 16),
}
# As many as there are, and never more than this: 1 stays 1.
_AT_MOST: dict[str, int] = {
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("num_kv_shared_layers", "num_nextn_predict_layers"), 0),
    "zero_expert_num": 2,
}
_KEY_VALUE_HEADS = ("num_key_value_heads", "kv_n_heads", "num_kv_heads", "swa_num_key_value_heads")
_LAYER_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"),
    *("num_encoder_layers", "num_decoder_layers", "num_blocks", "num_global_layers", "conf_num_hidden_layers"),
    "num_layers_per_stack",
)
# One entry a layer, in these.
_LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "attn_layers")
_LEFT_OUT = ("id2label", "label2id", "dtype", "transformers_version")

# Where a default is None and the model does not run so.
_WHERE_NONE = {"head_dim": 16, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}

# By model type: constructor arguments that no rule gives; a dict is for the sub-config of that name.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GEMMA4 = {"global_head_dim": 32}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_DOTS3_NOTE = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 24,
    "swa_kv_lora_rank": 24,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
    "head_dim": 24,
}
_BLT_LOCAL = {"hidden_size_global": 64}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "blt": {"encoder_config": _BLT_LOCAL, "decoder_config": _BLT_LOCAL, "encoder_hash_byte_group_vocab": 512},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note": {
        "text_config": _DOTS3_NOTE,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64, "per_layer_config": {}},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": _DOTS3_NOTE,
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n": {"text_config": {"intermediate_size": 96, "activation_sparsity_pattern": [0.95, 0.0]}},
    "gemma3n_text": {"intermediate_size": 96, "activation_sparsity_pattern": [0.95, 0.0]},
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"num_attention_heads_per_layer": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 24, "head_dim": 8},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [6, 8],  # it trains at exactly this product
        "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 4,
    },
    "roc_bert": {"shape_vocab_size": 512, "pronunciation_vocab_size": 512},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The config of a tiny model of this type, as a causal language model.

    Raises:
        Exception: whatever its config class has to say against it.
    """
    return _shrunk(CONFIG_MAPPING[model_type](), EXCEPTIONS.get(model_type, {}))


def _shrunk(config: PreTrainedConfig, given: dict[str, Any]) -> PreTrainedConfig:
    values = {f.name: _value(config, f.name) for f in dataclasses.fields(config) if f.name not in _LEFT_OUT}
    lists = _layer_lists(values)
    layers = len(next(iter(lists.values()))) if lists else LAYERS
    special = iter(range(VOCABULARY - 1, 0, -1))
    tiny: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            tiny[name] = _shrunk(value, given.get(name, {}))
        elif name in lists:
            tiny[name] = lists[name]
        elif name in _LAYER_COUNTS:
            tiny[name] = layers if type(value) is int else value
        elif name.endswith(("_token_id", "_token_index")):
            # No token of a batch is an image's or a sound's.
            tiny[name] = next(special) if type(value) is int and value >= 400 else value
        elif name in ("is_decoder", "causal"):
            tiny[name] = True
        elif name in _KEY_VALUE_HEADS:
            tiny[name] = _key_value_heads(values, value)
        elif not (name == "head_dim" and "qk_rope_head_dim" in values):  # there it follows from the parts
            tiny[name] = _smaller(name, value)
    tiny.update({name: value for name, value in given.items() if not isinstance(values.get(name), PreTrainedConfig)})
    return type(config)(**tiny)


def _value(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except AmbiguousGlobalPerLayerAttributeError:
        return config.to_dict()[name]


def _layer_lists(values: dict[str, Any]) -> dict[str, list[Any]]:
    """The lists with one entry a layer, cut down to one layer of each kind (`LAYERS` where all are alike)."""
    lists = {name: values[name] for name in _LAYER_LISTS if values.get(name)}
    if not lists:
        return {}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=False)))
    kinds = kinds * LAYERS if len(kinds) == 1 else kinds
    return {name: [kind[i] for kind in kinds] for i, name in enumerate(lists)}


def _key_value_heads(values: dict[str, Any], count: Any) -> Any:
    """Grouped stays grouped: 4 where every head has its own, 2 where some share, 1 where all do."""
    heads = next((values[name] for name in ("num_attention_heads", "n_heads") if name in values), None)
    return 4 if count in (None, heads) else min(count, 2)


def _smaller(name: str, value: Any) -> Any:
    if value is None:
        return _WHERE_NONE.get(name)
    if type(value) is not int:
        return value
    if name in _SIZES:
        return _SIZES[name] if value > 0 else value
    return min(value, _AT_MOST.get(name, value))
