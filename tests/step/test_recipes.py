"""Each recipe against the real class: the same bytes at the peak of every phase, and the same loss."""

import pytest
import torch
import trl.trainer.utils
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MixtralConfig, Qwen2Config

from autofit.errors import UsageError
from autofit.space.candidate import Candidate
from autofit.space.source import ModelSource
from autofit.step import fused_head
from autofit.step.batch import full_rows
from autofit.step.model import checkpointable_layers
from autofit.step.step import build_step, costliest_batches
from autofit.step.tokenizer import byte_tokenizer
from tests.step.stock_trainers import Run, measure_real, measure_recipe

LAYERS = 4
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
ATTENTION = {"gemma2": "eager"}  # transformers has no other for its soft cap


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """Folders of tiny models with random weights, by family."""
    tokenizer = byte_tokenizer()
    sizes = {**SIZES, "vocab_size": len(tokenizer)}
    sizes |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    configs = {
        "llama": LlamaConfig(**sizes),
        "gemma2": Gemma2Config(**sizes, head_dim=16, sliding_window=16, query_pre_attn_scalar=16),
        "qwen2": Qwen2Config(**sizes),
        "mixtral": MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2),
    }
    folders = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture(params=["sft", "trainer"])
def step(request):
    return request.param


def candidate(**knobs):
    return Candidate(**{"micro_batch_size": 2, "max_seq_length": 48, "dtype": "float32", "lora_rank": 8, **knobs})


def assert_same(families, family="llama", accumulation=1, steps=2, mixed=False, **knobs):
    asked = candidate(dtype="bfloat16" if mixed else "float32", **knobs)
    run = Run(families[family], asked, accumulation, steps, mixed, ATTENTION.get(family, "sdpa"))
    real, recipe = measure_real(run), measure_recipe(run)
    assert recipe.static_bytes == real.static_bytes
    assert recipe.peaks == real.peaks
    assert len(real.peaks) == steps * (accumulation + 2)
    assert recipe.loss == pytest.approx(real.loss, rel=2e-3 if mixed else 1e-5)


@pytest.fixture
def narrow_tiles(monkeypatch):
    """TRL's tiles are wider than a tiny model is large: the peak would be theirs in every phase."""
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    monkeypatch.setattr(fused_head, "VOCABULARY_CHUNK", 64)


def test_the_tiles_are_trls():
    assert fused_head.VOCABULARY_CHUNK == trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE


@pytest.mark.parametrize("layers", [0, LAYERS])
def test_with_trls_own_tiles(families, layers):
    assert_same(families, step="sft", checkpointed_layers=layers)


@pytest.mark.usefixtures("narrow_tiles")
class TestBytes:
    @pytest.mark.parametrize("accumulation", [1, 2])
    @pytest.mark.parametrize("layers", [0, LAYERS, LAYERS // 2])
    def test_checkpointing_and_accumulation(self, families, step, layers, accumulation):
        assert_same(families, accumulation=accumulation, step=step, checkpointed_layers=layers)

    @pytest.mark.parametrize("bits", [16, 4])
    @pytest.mark.parametrize("family", ["gemma2", "qwen2", "mixtral"])
    def test_families(self, families, step, family, bits):
        assert_same(families, family, accumulation=2, step=step, quantization_bits=bits)

    @pytest.mark.parametrize("layers", [0, LAYERS])
    @pytest.mark.parametrize("bits", [16, 4])
    def test_mixed_precision(self, families, step, bits, layers):
        assert_same(families, mixed=True, step=step, quantization_bits=bits, checkpointed_layers=layers)

    @pytest.mark.parametrize("mixed", [False, True])
    def test_prepared_by_peft(self, families, step, mixed):
        assert_same(
            families, mixed=mixed, step=step, quantization_bits=4, prepare_kbit=True, checkpointed_layers=LAYERS
        )

    @pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
    def test_optimizers_and_rank(self, families, step, optimizer):
        assert_same(families, "qwen2", steps=3, step=step, optimizer=optimizer, lora_rank=64)

    def test_dropout_and_one_row(self, families, step):
        assert_same(families, step=step, lora_dropout=0.05, micro_batch_size=1, max_seq_length=100)


def gradients(families, asked, **policy):
    run = Run(families["llama"], asked)
    built = build_step(asked, ModelSource(model=run.folder), run.policy(**policy), 16, seed=0)
    for name, parameter in built.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    loss = built.accumulate([full_rows(2, 48, 256)], 0)
    return loss, torch.cat([p.grad.flatten() for p in built.model.parameters() if p.requires_grad])


def test_a_gpus_choice_of_positions_changes_no_gradient(families):
    loss, here = gradients(families, candidate(step="sft"))
    gpu_loss, gpu = gradients(families, candidate(step="sft"), fused_optimizer=True)
    assert torch.equal(loss, gpu_loss)
    assert torch.equal(here, gpu)


def test_the_positions_need_no_values():
    hidden = torch.empty(2, 7, 8, device="meta", requires_grad=True)
    mask = torch.empty(2, 7, dtype=torch.bool, device="meta")
    chosen = fused_head._Chosen.apply(hidden, mask, 14)
    placed = fused_head._Placed.apply(chosen.sum(-1), mask)
    placed.sum().backward()
    assert (chosen.shape, placed.shape, hidden.grad.shape) == ((14, 8), (2, 7), (2, 7, 8))


@pytest.mark.parametrize(("layers", "checkpointed"), [(1, [0]), (2, [0, 2]), (4, [0, 1, 2, 3])])
def test_checkpointed_layers_are_every_nth(families, step, layers, checkpointed):
    asked = candidate(step=step, checkpointed_layers=layers)
    run = Run(families["llama"], asked)
    model = build_step(asked, ModelSource(model=run.folder), run.policy(), 16, seed=0).model
    assert [i for i, layer in enumerate(checkpointable_layers(model)) if layer.gradient_checkpointing] == checkpointed


def test_a_number_of_layers_that_no_stock_setting_checkpoints_is_refused(families, step):
    asked = candidate(step=step, checkpointed_layers=3)
    run = Run(families["llama"], asked)
    with pytest.raises(UsageError, match=r"checkpointed_layers 3 with step \w+: .* leaves one of 1, 2, 4"):
        build_step(asked, ModelSource(model=run.folder), run.policy(), 16, seed=0)


def test_a_trial_runs_whole_rows(step):
    (batch,) = costliest_batches(candidate(step=step), vocabulary=256)
    assert tuple(batch.input_ids.shape) == (2, 48)
    assert batch.targets.numel() == 0
