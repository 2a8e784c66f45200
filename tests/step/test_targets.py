"""Which layers get an adapter, and that the names given for them mean the same layers again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import AutoModelForCausalLM, GPT2Config, Llama4TextConfig, LlamaConfig, Mamba2Config, Qwen3MoeConfig

from autofit.space.candidate import Candidate
from autofit.step.model import add_lora
from autofit.step.targets import lora_targets_used, shortest_names, target_modules

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, intermediate_size=64),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64),
    "mamba2": Mamba2Config(
        hidden_size=32, num_hidden_layers=2, vocab_size=64, num_heads=8, head_dim=8, state_size=8, n_groups=1
    ),
}
PLAIN = Candidate(micro_batch_size=1, max_seq_length=8, dtype="float32")


def adapters(model):
    return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_names_of_the_adapted_layers_give_the_same_layers_again(name):
    model = add_lora(AutoModelForCausalLM.from_config(CONFIGS[name]), PLAIN, 32)
    names = lora_targets_used(model)
    again = add_lora(AutoModelForCausalLM.from_config(CONFIGS[name]), PLAIN.replace(lora_targets=tuple(names)), 32)
    assert adapters(again) == adapters(model)
    assert lora_targets_used(again) == names


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_all_linear_is_pefts_where_peft_can(name):
    theirs = get_peft_model(
        AutoModelForCausalLM.from_config(CONFIGS[name]),
        LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"),
    )
    base = AutoModelForCausalLM.from_config(CONFIGS[name])
    assert target_modules(base, ("all-linear",)) == "all-linear"
    assert adapters(add_lora(base, PLAIN, 32)) == adapters(theirs)


def test_what_peft_refuses_is_left_out():
    model = add_lora(AutoModelForCausalLM.from_config(CONFIGS["mamba2"]), PLAIN, 32)
    assert lora_targets_used(model) == ["in_proj"]


def test_a_router_that_answers_a_tuple_is_left_out():
    config = Llama4TextConfig(**SMALL, intermediate_size=64, intermediate_size_mlp=64, num_local_experts=2)
    model = add_lora(AutoModelForCausalLM.from_config(config), PLAIN, 32)
    assert "router" not in lora_targets_used(model)
    assert "shared_expert.down_proj" in " ".join(adapters(model))


def test_experts_that_are_fused_into_tensors_keep_the_names_of_their_projections():
    config = Qwen3MoeConfig(
        **SMALL, num_key_value_heads=2, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    )
    model = add_lora(AutoModelForCausalLM.from_config(config), PLAIN, 32)
    names = lora_targets_used(model)
    assert {"gate_proj", "up_proj", "down_proj"} < set(names)
    assert any("experts" in name for name in adapters(model))
    again = add_lora(AutoModelForCausalLM.from_config(config), PLAIN.replace(lora_targets=tuple(names)), 32)
    assert adapters(again) == adapters(model)


PATHS = st.lists(
    st.lists(st.sampled_from(["a", "b", "0", "1"]), min_size=1, max_size=4).map(".".join), min_size=1, unique=True
)


@given(PATHS, st.data())
def test_the_shortest_names_match_what_was_chosen_and_nothing_else(every, data):
    chosen = data.draw(st.lists(st.sampled_from(every), unique=True))
    # A path that is the end of a longer one can be named only together with it.
    chosen = [p for p in every if any(p == c or p.endswith(f".{c}") for c in chosen)]
    config = LoraConfig(target_modules=shortest_names(chosen, every) or ["none of them"])
    assert [p for p in every if check_target_module_exists(config, p)] == chosen
