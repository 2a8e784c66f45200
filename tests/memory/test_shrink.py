"""The layers that are traced show every neighbourhood that the model has, and each stands for its like."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig, Qwen3MoeConfig

from autofit.memory.shrink import keep_layers, kept_layers, layer_kinds, places_in, shared_row, stands_for
from autofit.step.model import checkpointable_layers, empty_base

KINDS = st.lists(st.sampled_from("abc"), min_size=1, max_size=30)
PERIOD = st.lists(st.sampled_from("ab"), min_size=1, max_size=4)
PERIODS = st.tuples(PERIOD, st.integers(1, 8)).map(lambda p: p[0] * p[1])
REACH = st.sampled_from((1, 2, 6))


def around(kinds, at, reach):
    return [kinds[i] if 0 <= i < len(kinds) else None for i in range(at - reach, at + reach + 1)]


@given(st.one_of(KINDS, PERIODS), REACH)
def test_each_layer_is_stood_for_by_one_of_its_kind_with_the_same_neighbours(kinds, reach):
    kept = kept_layers(kinds, reach)
    assert kept == sorted(set(kept))
    shown = [kinds[i] for i in kept]
    for layer, traced in enumerate(stands_for(kinds, kept, reach)):
        assert around(shown, traced, reach) == around(kinds, layer, reach)


@given(st.one_of(KINDS, PERIODS), REACH)
def test_the_first_and_the_last_stand_for_themselves_alone(kinds, reach):
    kept = kept_layers(kinds, reach)
    stood = stands_for(kinds, kept, reach)
    assert stood[0] == 0
    assert stood[-1] == len(kept) - 1
    assert stood.count(0) == stood.count(len(kept) - 1) == 1


@given(st.one_of(KINDS, PERIODS), REACH)
def test_nothing_can_be_taken_from_what_was_kept(kinds, reach):
    shown = [kinds[i] for i in kept_layers(kinds, reach)]
    assert kept_layers(shown, reach) == list(range(len(shown)))


@given(st.lists(st.one_of(KINDS, PERIODS), min_size=1, max_size=3), REACH)
def test_a_shared_row_has_a_place_for_each_layer_of_every_row(rows, reach):
    shown = shared_row(rows, reach)
    if shown is None:
        ends = {(tuple(row[: 2 * reach]), tuple(row[-2 * reach :])) for row in rows}
        assert len(ends) > 1 or min(map(len, rows)) < 2 * reach
        return
    for kinds in rows:
        for layer, place in enumerate(places_in(shown, kinds, reach)):
            assert around(shown, place, reach) == around(kinds, layer, reach)


@pytest.mark.parametrize(("layers", "reach", "expected"), [(80, 1, 3), (80, 6, 13), (3, 1, 3), (2, 1, 2), (1, 1, 1)])
def test_of_layers_that_are_all_alike_few_are_kept(layers, reach, expected):
    assert len(kept_layers(["a"] * layers, reach)) == expected


@given(st.integers(3, 12), st.integers(1, 5))
def test_a_long_model_needs_no_more_than_a_short_one(repeats, period):
    pattern = ["a"] * (period - 1) + ["b"]
    assert len(kept_layers(pattern * 4 * repeats)) <= len(kept_layers(pattern * 8))


def base_of(config):
    return empty_base(config, "float32", "sdpa")


def small(kind, **more):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    return kind(**sizes, num_key_value_heads=2, num_hidden_layers=6, **more)


def test_layers_that_differ_in_their_modules_types_or_settings_are_of_different_kinds():
    assert len(set(layer_kinds(base_of(small(LlamaConfig))))) == 1
    windows = small(LlamaConfig)
    windows.layer_types = ["sliding_attention", "full_attention"] * 3
    assert len(set(layer_kinds(base_of(windows)))) == 2
    experts = small(Qwen3MoeConfig, num_experts=2, moe_intermediate_size=8, mlp_only_layers=[0, 3])
    kinds = layer_kinds(base_of(experts))
    assert kinds[0] == kinds[3] != kinds[1] == kinds[2] == kinds[4]


@pytest.mark.parametrize("config", [small(LlamaConfig), GPT2Config(n_embd=16, n_head=2, n_layer=6, vocab_size=32)])
def test_the_others_are_taken_out_of_the_model_and_its_config(config):
    config.layer_types = list("abcdef")
    base = base_of(config)
    layers = checkpointable_layers(base)
    assert keep_layers(base, [0, 2, 5])
    assert checkpointable_layers(base) == [layers[0], layers[2], layers[5]]
    assert base.config.num_hidden_layers == 3
    assert base.config.layer_types == ["a", "c", "f"]
    assert base.base_model.config is base.config
    assert config.num_hidden_layers == 6


def test_layers_that_are_in_no_list_of_their_own_are_left_as_they_are():
    base = base_of(small(LlamaConfig))
    base.model.layers.append(base_of(small(LlamaConfig)).model.norm)
    assert not keep_layers(base, [0, 2, 5])
    assert len(checkpointable_layers(base)) == 6
