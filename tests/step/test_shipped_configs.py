"""The configs that ship make the models that were published: the same number of parameters, to the last one."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from autofit.errors import AccessError, UsageError
from autofit.space.models import MODELS, known_model
from autofit.space.source import ModelSource
from autofit.step.configs import check_config, load_config
from autofit.step.inspect import inspect_model
from autofit.step.tokenizer import load_tokenizer

# The totals in the models' safetensors metadata on the hub. Where a checkpoint stores a tied output layer a second
# time (Qwen 3 0.6B and 1.7B), it is counted once here.
PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 751_632_384 - 151_936 * 1024,
    "qwen3-1.7b": 2_031_739_904 - 151_936 * 2048,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472,
    "gemma-3-12b": 12_187_325_040,
    "gemma-3-27b": 27_432_406_640,
    "phi-3-mini": 3_821_079_552,
    "phi-3-medium": 13_960_238_080,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}
WITH_VISION = ("gemma-3-4b", "gemma-3-12b", "gemma-3-27b")


def vision_parameters(hidden: int) -> int:
    """What Gemma 3's published totals count beside the language model: a SigLIP encoder and its projection.

    27 layers of width 1152 and 4304, patches of 14×14 in an image of 896×896.
    """
    width, inner, layers = 1152, 4304, 27
    norm = 2 * width
    attention = 4 * (width * width + width)
    mlp = width * inner + inner + inner * width + width
    embeddings = 3 * 14 * 14 * width + width + (896 // 14) ** 2 * width
    projection = width + width * hidden
    return embeddings + layers * (2 * norm + attention + mlp) + norm + projection


@pytest.mark.parametrize("name", MODELS)
def test_the_parameters_are_those_published(name):
    config = AutoConfig.for_model(**known_model(name))
    check_config(config, name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    vision = vision_parameters(config.hidden_size) if name in WITH_VISION else 0
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name] - vision


@pytest.mark.parametrize("model", ["smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_a_known_model_is_inspected_without_hub_or_files(model):
    facts = inspect_model(ModelSource(model=model, random_weights=True))
    assert facts.num_parameters == PUBLISHED["smollm2-135m"]
    assert facts.max_positions == 8192
    assert facts.checkpointable_layers == 30
    assert facts.download_bytes == 0


def test_a_folder_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AutoConfig.for_model("llama", vocab_size=300, num_hidden_layers=3).save_pretrained("llama-3-8b")
    assert load_config(ModelSource(model="llama-3-8b", random_weights=True)).num_hidden_layers == 3


def test_a_bare_name_has_no_weights_and_says_where_they_are():
    with pytest.raises(UsageError, match="meta-llama/Meta-Llama-3-8B"):
        load_config(ModelSource(model="llama-3-8b"))


def test_a_misspelt_name_says_what_is_known():
    with pytest.raises(AccessError, match="llama-3-8b"):
        load_config(ModelSource(model="llama3-8b", random_weights=True))


def test_a_bare_name_with_random_weights_cuts_text_into_bytes():
    loaded = load_tokenizer("llama-3-8b", allow_byte_tokenizer=True)
    assert loaded.tokenizer("ab")["input_ids"][:2] == [97, 98]
    assert any("bytes" in note for note in loaded.notes)
