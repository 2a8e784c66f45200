"""A config that makes no model is refused in one line that names the model and the cause; nothing else is raised."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from autofit.errors import UsageError
from autofit.space.source import ModelSource
from autofit.step.configs import check_config, load_config
from autofit.step.inspect import inspect_model

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": SIZES,
    "mistral": {**SIZES, "sliding_window": 8},
    "qwen3": {**SIZES, "head_dim": 8},
    "gemma2": {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8},
    "phi3": {**SIZES, "pad_token_id": 1},
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
REMOTE = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}}


def llama(**changes):
    return {"model_type": "llama", **SIZES, **changes}


def refusal(folder, config, find=inspect_model, **source):
    """The message of a UsageError that `config` (a dict, or a file's text) raises."""
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text)
    with pytest.raises(UsageError) as error:
        find(ModelSource(model=str(folder), random_weights=True, **source))
    return str(error.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("", "rejects its config"),
        ("{not json", "rejects its config"),
        ("[]", "rejects its config"),
        ('"llama"', "rejects its config"),
        ("null", "rejects its config"),
        ("{}", "rejects its config"),
        ({"model_type": "no_such_thing"}, "no_such_thing"),
        ({"model_type": ""}, "rejects its config"),
        ({"model_type": 5}, "rejects its config"),
        ({"model_type": ["llama"]}, "rejects its config"),
        (llama(hidden_size="x"), "hidden_size"),
        (llama(hidden_size=-32), "hidden_size"),
        (llama(hidden_size=0), "hidden_size"),
        (llama(hidden_size=33), "33"),
        (llama(hidden_size=2**62), "hidden_size"),
        (llama(vocab_size=0), "vocab_size"),
        (llama(vocab_size=10**9), "vocab_size"),
        (llama(intermediate_size=-1), "intermediate_size"),
        (llama(num_hidden_layers=0), "num_hidden_layers"),
        (llama(num_hidden_layers=10**6), "num_hidden_layers"),
        ({"model_type": "qwen3", **FAMILIES["qwen3"], "num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"model_type": "gemma3", "text_config": {**SIZES, "num_hidden_layers": 10**12}}, "num_hidden_layers"),
        (llama(num_attention_heads=0), "num_attention_heads"),
        (llama(num_key_value_heads=3), "num_key_value_heads 3"),
        (llama(num_key_value_heads=0), "num_key_value_heads"),
        (llama(num_key_value_heads=8), "num_key_value_heads 8"),
        (llama(head_dim=3), "head_dim 3 is odd"),
        (llama(head_dim=7), "head_dim"),
        (llama(num_attention_heads=-4), "num_attention_heads -4"),
        (llama(head_dim=-8), "head_dim"),
        (llama(hidden_act="nope"), "nope"),
        (llama(rope_parameters={"rope_type": "nope", "rope_theta": 1e4}), "nope"),
        (llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}), "factor"),
        (llama(attention_dropout=2.0), "attention_dropout"),
        (llama(pad_token_id=4000), "pad_token_id 4000"),
        (llama(pad_token_id=300), "adding"),
        (llama(text_config=5), "text_config"),
        (llama(dtype="nope"), "nope"),
        (llama(quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
        (llama(quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}), "int4"),
        ({"model_type": "mixtral", **FAMILIES["mixtral"], "num_experts_per_tok": 5}, "num_experts_per_tok 5"),
        ({"model_type": "mixtral", **FAMILIES["mixtral"], "hidden_size": 34}, "hidden_size 34"),
        ({"model_type": "gpt2", **FAMILIES["gpt2"], "n_head": 5}, "num_attention_heads 5"),
        ({"model_type": "gemma3_text", **FAMILIES["gemma3_text"], "layer_types": ["full_attention"]}, "layer"),
        ({"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2}, "encoder"),
        ({"model_type": "roberta", "hidden_size": 32, "num_attention_heads": 2}, "encoder"),
        ({"model_type": "t5"}, "T5Config makes no causal language model"),
        ({"model_type": "vit"}, "ViTConfig makes no causal language model"),
    ],
)
def test_what_makes_no_model_is_refused_by_name_and_cause(tmp_path, config, says):
    message = refusal(tmp_path, config)
    assert says in message
    assert str(tmp_path) in message
    assert "\n" not in message
    assert len(message) < len(str(tmp_path)) + 300


@pytest.mark.parametrize("native", [False, True])
def test_remote_code_runs_only_when_asked_for(tmp_path, native):
    """The flag is named where the code is needed; where transformers knows the type, its own class is taken."""
    (tmp_path / "mine.py").write_text("raise RuntimeError('it ran')")
    if native:
        (tmp_path / "config.json").write_text(json.dumps({**REMOTE, **llama()}))
        assert load_config(ModelSource(model=str(tmp_path))).model_type == "llama"
        return
    message = refusal(tmp_path, REMOTE, load_config)
    assert "--trust-remote-code" in message
    assert "\n" not in message


def test_binary_and_other_folders_are_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(bytes(range(128, 256)))
    with pytest.raises(UsageError, match="rejects its config"):
        load_config(ModelSource(model=str(tmp_path)))
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UsageError, match=r"no config\.json"):
        load_config(ModelSource(model=str(tmp_path)))


VALUES = st.one_of(
    st.sampled_from([-1, 0, 1, 3, 5, 7, 33, 10**9, 2**63, 2**70, 2.5, "x", "64", "", None, True, [], [4, 4], {}]),
    st.integers(-(2**40), 2**40).filter(lambda n: not 64 < n < 2**26),
)
OTHERS = (
    "head_dim",
    "rope_parameters",
    "layer_types",
    "pad_token_id",
    "sliding_window",
    "rms_norm_eps",
    "attention_dropout",
    "tie_word_embeddings",
    "quantization_config",
    "text_config",
    "architectures",
    "auto_map",
    "dtype",
)
FIELDS = st.sampled_from(sorted(FAMILIES)).flatmap(
    lambda family: st.tuples(st.just(family), st.sampled_from([*FAMILIES[family], *OTHERS]))
)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(field=FIELDS, value=VALUES)
@example(field=("mixtral", "hidden_size"), value=3)  # a head of no width: transformers divides by zero
@example(field=("llama", "text_config"), value={})
def test_any_one_value_makes_a_model_or_one_line(tmp_path, field, value):
    family, name = field
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **FAMILIES[family], name: value}))
    message = None
    try:
        inspect_model(ModelSource(model=str(tmp_path), random_weights=True))
    except UsageError as error:
        message = str(error)
    assert message is None or (str(tmp_path) in message and "\n" not in message)


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_no_architecture_s_own_defaults_are_refused(model_type):
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception as error:
        pytest.skip(f"{model_type} has no defaults: {type(error).__name__}")
    check_config(config, model_type)
