"""The estimate: near what was measured, with a breakdown that adds up, guesses on record, and nothing left behind."""

import bitsandbytes.functional
import pytest
import torch
from torch.optim import adam, optimizer
from transformers import LlamaConfig, Qwen3MoeConfig, masking_utils
from trl.kernels import chunked_logprob

from autofit.errors import UsageError
from autofit.memory.breakdown import PARTS
from autofit.memory.calibration import Calibration
from autofit.memory.estimate import estimate
from autofit.space.candidate import Candidate
from autofit.space.facts import DeviceFacts
from autofit.space.source import ModelSource
from autofit.step.batch import worst_micro_batches
from autofit.step.policy import resolve_policy
from autofit.step.step import build_step
from tests.conftest import CPU

H200 = DeviceFacts(type="cuda", name="NVIDIA H200", total_bytes=150_754_820_096, compute_capability=(9, 0))
LLAMA = ModelSource(model="llama-3-8b", random_weights=True)
PLAIN = Candidate(micro_batch_size=2, max_seq_length=64, lora_rank=4, quantization_bits=4)

# Measured on an H200 with torch 2.11, 2026-11-23: fields, peak allocated and reserved bytes.
MEASURED = [
    (
        {"micro_batch_size": 2, "checkpointed_layers": 32, "lora_rank": 64, "optimizer": "adamw_torch", "step": "sft"},
        (8_894_249_472, 9_785_311_232),
    ),
    (
        {"micro_batch_size": 4, "checkpointed_layers": 16, "optimizer": "paged_adamw_8bit", "step": "sft"},
        (31_985_319_424, 33_367_785_472),
    ),
    (
        {"micro_batch_size": 4, "checkpointed_layers": 32, "optimizer": "paged_adamw_8bit", "step": "trainer"},
        (20_873_510_400, 25_065_160_704),
    ),
]


@pytest.mark.parametrize(("fields", "measured"), MEASURED)
def test_it_is_near_what_was_measured(fields, measured):
    found = estimate(Candidate(max_seq_length=2048, quantization_bits=4, **fields), LLAMA, H200)
    allocated, reserved = measured
    assert found.peak_allocated_bytes == pytest.approx(allocated, rel=0.003)
    assert found.peak_reserved_bytes == pytest.approx(reserved, rel=0.03)
    assert found.bracket is None
    assert not found.guesses
    assert sum(found.breakdown_bytes.values()) == found.device_bytes
    assert found.breakdown_bytes["weights"] == pytest.approx(5_706_426_368, rel=0.001)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A Llama and a mixture of experts of four layers each, as configs alone."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 512, "num_hidden_layers": 4}
    LlamaConfig(**sizes).save_pretrained(folder / "llama")
    experts = Qwen3MoeConfig(**sizes, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    experts.save_pretrained(folder / "experts")
    return {name: ModelSource(model=str(folder / name), random_weights=True) for name in ("llama", "experts")}


@pytest.mark.parametrize("device", [H200, CPU], ids=["cuda", "cpu"])
@pytest.mark.parametrize("accumulates", [False, True])
def test_the_breakdown_adds_up(small, device, accumulates):
    candidate = PLAIN.replace(quantization_bits=16, dtype="float32", accumulates=accumulates)
    found = estimate(candidate, small["llama"], device)
    assert tuple(found.breakdown_bytes) == PARTS
    assert min(found.breakdown_bytes.values()) >= 0
    assert sum(found.breakdown_bytes.values()) == found.device_bytes
    assert found.device_bytes >= found.peak_reserved_bytes >= found.peak_allocated_bytes


def test_a_calibration_is_added_once(small):
    bare = estimate(PLAIN, small["llama"], H200, Calibration())
    found = estimate(PLAIN, small["llama"], H200, Calibration(context_bytes=7, allocated_bytes=512, speed=0.5))
    assert found.peak_allocated_bytes == bare.peak_allocated_bytes + 512
    assert found.peak_reserved_bytes == bare.peak_reserved_bytes + 512
    assert found.device_bytes == bare.device_bytes + 512 + 7
    assert found.tokens_per_second == pytest.approx(bare.tokens_per_second / 2)
    assert sum(found.breakdown_bytes.values()) == found.device_bytes


def test_outliers_that_nobody_knows_make_a_bracket(small):
    found = estimate(PLAIN.replace(quantization_bits=8), small["llama"], H200)
    assert found.bracket is not None
    low, high = found.bracket
    assert low < high
    assert found.peak_allocated_bytes in (low, high)


@pytest.mark.parametrize("bits", [16, 4])
def test_even_routing_is_on_record_and_decides_nothing_where_experts_are_batched(small, bits):
    found = estimate(PLAIN.replace(quantization_bits=bits), small["experts"], H200)
    assert "even routing by topk" in found.guesses
    assert found.bracket is None or found.bracket[0] <= found.peak_allocated_bytes <= found.bracket[1]


def test_paged_states_are_told_apart(small):
    plain = estimate(PLAIN.replace(optimizer="adamw_8bit"), small["llama"], H200)
    # bitsandbytes pages states of 100,000 elements and more.
    paged = estimate(PLAIN.replace(optimizer="paged_adamw_32bit", lora_rank=2048), small["llama"], H200)
    assert plain.paged_bytes == 0
    assert paged.paged_bytes > 0
    assert paged.breakdown_bytes["optimizer"] < paged.paged_bytes


def test_paged_states_are_those_of_all_layers():
    """Llama-3-8B, rank 16: two states of four bytes, of the adapters of 100,000 elements and more."""
    candidate = PLAIN.replace(
        optimizer="paged_adamw_32bit", lora_rank=16, quantization_bits=4, lora_targets=("all-linear",)
    )
    source = ModelSource(model="llama-3-8b", random_weights=True)
    large = 2 * 16 * 14336 + 14336 * 16  # B of gate_proj and up_proj, A of down_proj
    assert estimate(candidate, source, H200).paged_bytes == 32 * large * 2 * 4


def test_the_same_question_has_the_same_answer(small):
    first, second = (estimate(PLAIN, small["llama"], H200).to_json() for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def loss_of_a_real_step(source):
    candidate = PLAIN.replace(quantization_bits=16, dtype="float32")
    torch.manual_seed(0)
    step = build_step(candidate, source, resolve_policy(candidate, CPU), lora_alpha=8, seed=0)
    loss = step.accumulate(worst_micro_batches(128, 64, 512), 126)
    return float(loss)


WATCHED = [
    (torch, ("tensor", "is_autocast_enabled", "get_autocast_dtype", "Tensor", "autocast")),
    (torch.autocast, ("__init__", "__enter__", "__exit__")),
    (torch.amp, ("is_autocast_available",)),
    (torch.nn.functional, ("scaled_dot_product_attention", "dropout", "linear")),
    (optimizer, ("_get_fused_kernels_supported_devices",)),
    (adam, ("_device_dtype_check_for_fused",)),
    (bitsandbytes.functional, ("get_paged", "fill", "prefetch_tensor")),
    (chunked_logprob, ("_use_triton", "_forward_kernel", "_backward_kernel", "_addmm_fp32")),
    (masking_utils, ("fast_all",)),
]


def everything_watched():
    return [getattr(owner, name, None) for owner, names in WATCHED for name in names]


def same(before, after):
    return all(one is other for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("step", ["autofit", "sft", "trainer"])
def test_it_leaves_nothing_behind(small, step):
    expected, before = loss_of_a_real_step(small["llama"]), everything_watched()
    for device in (H200, CPU):
        dtype = "bfloat16" if device is H200 else "float32"
        estimate(PLAIN.replace(step=step, quantization_bits=16, dtype=dtype), small["llama"], device)
    assert same(before, everything_watched())
    assert torch._C._len_torch_dispatch_stack() == 0
    assert not torch.is_autocast_enabled("cuda")
    assert loss_of_a_real_step(small["llama"]) == expected


def test_nor_does_one_that_fails(small):
    before = everything_watched()
    with pytest.raises(UsageError):
        estimate(PLAIN.replace(lora_targets=("no_such_layer",)), small["llama"], H200)
    assert same(before, everything_watched())
    assert torch._C._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize(
    "config", ['{"model_type": "no_such_kind"}', "{", '{"model_type": "llama", "hidden_size": -1}']
)
def test_what_is_no_model_is_one_clear_line(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UsageError) as caught:
        estimate(PLAIN, ModelSource(model=str(tmp_path), random_weights=True), H200)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
