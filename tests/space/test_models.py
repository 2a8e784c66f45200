import pytest

from autofit.space.models import MODELS, hub_id, known_model, known_name, near_models


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("llama-3-8b", "llama-3-8b"),
        ("Llama-3-8B", "llama-3-8b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("unsloth/Llama-3.2-1B-Instruct", "llama-3.2-1b"),
        ("mistral-7b", "mistral-7b-v0.1"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("someone/Meta-Llama-3-8B", None),
        ("unsloth/llama-3-8b-bnb-4bit", None),  # its own quantization is not among the facts
        ("llama-3", None),
        ("", None),
    ],
)
def test_names_and_official_ids_are_known_and_nothing_else(spelling, name):
    assert known_name(spelling) == name
    assert (known_model(spelling) is None) == (name is None)


def test_every_model_has_a_type_a_hub_id_and_a_config_of_its_own():
    for name in MODELS:
        assert name == name.lower()
        assert known_name(hub_id(name)) == name
        known_model(name)["hidden_size"] = 0
        assert known_model(name)["hidden_size"] > 0


def test_a_misspelt_name_has_neighbours():
    assert "llama-3-8b" in near_models("llama3-8b")
    assert near_models("nothing-like-it") == []
