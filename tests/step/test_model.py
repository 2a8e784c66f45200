"""The one builder: what it builds, and that random weights need the same bytes as real ones."""

import gc
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Gemma2Config, LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from autofit.errors import UsageError
from autofit.memory.ledger import Ledger
from autofit.space.candidate import Candidate
from autofit.space.source import ModelSource
from autofit.step.batch import worst_micro_batches
from autofit.step.inspect import inspect_model
from autofit.step.model import build_model, checkpointable_layers, load_base, load_config
from autofit.step.optimizer import build_optimizer
from autofit.step.policy import resolve_policy
from autofit.step.step import build_step
from tests.conftest import CPU

PLAIN = Candidate(micro_batch_size=2, max_seq_length=32, dtype="float32")


def peak(candidate, source):
    """Bytes of two optimizer steps, by the ledger."""
    step = build_step(candidate, source, resolve_policy(candidate, CPU), lora_alpha=32, seed=0)
    optimizer = build_optimizer(step.model, candidate, step.policy, 1e-3)
    (batch,) = worst_micro_batches(candidate.token_budget, candidate.max_seq_length, 256)
    ledger = Ledger()
    ledger.hold([*step.model.parameters(), *step.model.buffers()])
    static = ledger.live_bytes
    with ledger:
        for _ in range(2):
            step.accumulate([batch], 64)
            optimizer.step()
            optimizer.zero_grad()
    return static, ledger.peak_bytes


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_random_weights_need_the_same_bytes_as_pretrained_ones(tiny_model, bits):
    candidate = PLAIN.replace(quantization_bits=bits)
    real = peak(candidate, ModelSource(model=str(tiny_model)))
    gc.collect()
    assert peak(candidate, ModelSource(model=str(tiny_model), random_weights=True)) == real


@pytest.mark.parametrize("random_weights", [True, False])
@pytest.mark.parametrize(("bits", "layer"), [(16, "Linear"), (8, "Linear8bitLt"), (4, "Linear4bit")])
def test_quantized_base_float32_adapters_and_nothing_else_trains(tiny_model, bits, layer, random_weights):
    candidate = PLAIN.replace(quantization_bits=bits, lora_rank=8)
    source = ModelSource(model=str(tiny_model), random_weights=random_weights)
    model = build_model(candidate, source, resolve_policy(candidate, CPU), lora_alpha=32, seed=0)
    wrapped = model.base_model.model.model.layers[0].mlp.up_proj
    assert type(wrapped.base_layer).__name__ == layer
    assert wrapped.scaling["default"] == 32 / 8  # alpha stays when the rank falls
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert len(trained) == 4 * 7 * 2  # all linear layers: seven in each of four decoder layers, A and B
    assert model.training


def test_weights_in_bfloat16_have_float32_adapters(tiny_source):
    candidate = PLAIN.replace(dtype="bfloat16")
    model = build_model(candidate, tiny_source, resolve_policy(candidate, CPU), lora_alpha=32, seed=0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_adapters_are_a_function_of_the_seed(tiny_source):
    def first(seed):
        model = build_model(PLAIN, tiny_source, resolve_policy(PLAIN, CPU), lora_alpha=32, seed=seed)
        return next(p for n, p in model.named_parameters() if "lora_A" in n)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4])
def test_so_many_layers_are_checkpointed(tiny_source, n):
    candidate = PLAIN.replace(checkpointed_layers=n)
    model = build_model(candidate, tiny_source, resolve_policy(candidate, CPU), lora_alpha=32, seed=0)
    flags = [layer.gradient_checkpointing for layer in checkpointable_layers(model)]
    assert sum(flags) == n
    if n == 2:
        stock = load_base(load_config(tiny_source), candidate, tiny_source, resolve_policy(candidate, CPU))
        stock.activation_checkpointing_enable(every_n_layers=2)
        assert flags == [m.gradient_checkpointing for m in stock.modules() if isinstance(m, GradientCheckpointingLayer)]


@pytest.mark.parametrize("random_weights", [True, False])
def test_building_in_four_bits_never_holds_the_whole_model_unquantized(tmp_path, random_weights):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    candidate = PLAIN.replace(quantization_bits=4)
    source = ModelSource(model=str(tmp_path), random_weights=random_weights)
    with Ledger() as ledger:
        model = build_model(candidate, source, resolve_policy(candidate, CPU), lora_alpha=32, seed=0)
        ledger.hold([*model.parameters(), *model.buffers()])
    largest = 4 * 256 * 512
    # One layer in float32 and what quantizing it takes, beside what is kept.
    assert ledger.peak_bytes < ledger.live_bytes + 6 * largest


def test_more_checkpointing_less_memory_same_gradients(tiny_source):
    needs, gradients = [], []
    for n in (0, 2, 4):
        candidate = PLAIN.replace(checkpointed_layers=n, micro_batch_size=8, max_seq_length=64)
        needs.append(peak(candidate, tiny_source)[1])
        step = build_step(candidate, tiny_source, resolve_policy(candidate, CPU), lora_alpha=32, seed=0)
        step.accumulate(worst_micro_batches(64, 32, 256), 64)
        gradients.append(torch.cat([p.grad.flatten() for p in step.model.parameters() if p.requires_grad]))
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) == 3
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_a_quantized_checkpoint_is_built_by_its_own_settings(tiny_model, tmp_path):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", llm_int8_skip_modules=["o_proj"])
    saved = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=settings)
    saved.save_pretrained(tmp_path)
    candidate = PLAIN.replace(quantization_bits=4)
    sizes = []
    for random_weights in (False, True):
        source = ModelSource(model=str(tmp_path), random_weights=random_weights)
        model = build_model(candidate, source, resolve_policy(candidate, CPU), lora_alpha=32, seed=0)
        layer = model.base_model.model.model.layers[0]
        assert type(layer.self_attn.o_proj.base_layer).__name__ == "Linear"
        assert layer.mlp.up_proj.base_layer.weight.quant_type == "fp4"
        sizes.append(sum(p.numel() * p.element_size() for p in model.parameters()))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("changed", "bits", "says"),
    [
        (
            {"num_hidden_layers": 9},
            16,
            r"its weights lack model\.layers\.\d\.\S+ \(\d+ more like it\): a file is missing",
        ),
        ({"num_hidden_layers": 9}, 4, r"its weights lack model\.layers"),
        (
            {"intermediate_size": 8},
            16,
            r"of another model: model\.layers\.0\.mlp\.down_proj\.weight is \d+×\d+, and \d+×8",
        ),
    ],
)
def test_weights_that_are_not_the_config_s_are_refused_and_not_made_up(tiny_model, tmp_path, changed, bits, says):
    shutil.copytree(tiny_model, tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    candidate = PLAIN.replace(quantization_bits=bits)
    with pytest.raises(UsageError, match=says):
        build_model(
            candidate, ModelSource(model=str(tmp_path / "m")), resolve_policy(candidate, CPU), lora_alpha=32, seed=0
        )


def test_an_adapter_on_the_output_layer_is_refused_where_the_loss_would_pass_it_by(tiny_source):
    candidate = Candidate(micro_batch_size=1, max_seq_length=8, dtype="float32", lora_targets=("lm_head", "q_proj"))
    with pytest.raises(UsageError, match="loss: full"):
        build_model(candidate, tiny_source, resolve_policy(candidate, CPU), lora_alpha=32, seed=0)
    full = candidate.replace(loss="full")
    build_model(full, tiny_source, resolve_policy(full, CPU), lora_alpha=32, seed=0)


def test_targets_that_do_not_exist_are_named(tiny_source):
    candidate = Candidate(micro_batch_size=1, max_seq_length=8, dtype="float32", lora_targets=("nowhere_proj",))
    with pytest.raises(UsageError, match="nowhere_proj"):
        build_model(candidate, tiny_source, resolve_policy(candidate, CPU), lora_alpha=32, seed=0)


def test_float16_on_a_cpu_is_refused():
    with pytest.raises(UsageError, match="needs a GPU"):
        resolve_policy(PLAIN.replace(dtype="float16"), CPU)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no config.json"),
        ({"config.json": "{}"}, "rejects its config"),
        ({"config.json": '{"model_type": "no_such_thing"}'}, "no_such_thing"),
        ({"config.json": "{not json"}, "rejects its config"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path, files, says):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=says) as error:
        load_config(ModelSource(model=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_an_architecture_without_sdpa_runs_with_eager_attention(tmp_path):
    config = Gemma2Config(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    config.save_pretrained(tmp_path)
    source = ModelSource(model=str(tmp_path), random_weights=True)
    attention = inspect_model(source).attention
    candidate = PLAIN.replace(attention=attention)
    step = build_step(candidate, source, resolve_policy(candidate, CPU), lora_alpha=32, seed=0)
    loss = step.accumulate(worst_micro_batches(64, 32, 256), 62)
    assert attention in ("sdpa", "eager")
    assert torch.isfinite(loss)
    assert step.model.config._attn_implementation == attention
