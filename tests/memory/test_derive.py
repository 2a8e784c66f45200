"""Derived from one trace, an estimate is the traced one: for any rows and lengths, on a card and on a CPU."""

import pytest
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
)

from autofit.errors import UsageError
from autofit.memory import derive, tracing
from autofit.memory import estimate as estimating
from autofit.memory.calibration import Calibration
from autofit.memory.derive import estimate_many, side_by_side
from autofit.memory.estimate import estimate
from autofit.space.candidate import Candidate
from autofit.space.facts import DeviceFacts
from autofit.space.source import ModelSource
from tests.conftest import CPU

H200 = DeviceFacts(type="cuda", name="NVIDIA H200", total_bytes=150_754_820_096, compute_capability=(9, 0))
T4 = DeviceFacts(type="cuda", name="t4", total_bytes=15360 * 2**20, compute_capability=(7, 5))
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "num_hidden_layers": 4,
    "max_position_embeddings": 16384,
}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "deep": LlamaConfig(**{**SIZES, "num_hidden_layers": 32}),
    "window": Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=512),
    "capped": Gemma2Config(**SIZES, head_dim=16, sliding_window=128),
    "fused": Phi3Config(**SIZES, pad_token_id=0, sliding_window=None),
    "learned-positions": GPT2Config(n_embd=64, n_head=4, n_layer=4, vocab_size=512, n_positions=16384),
    "linear-attention": Qwen3_5TextConfig(**SIZES, head_dim=16, linear_key_head_dim=16, linear_value_head_dim=16),
    "experts": Qwen3MoeConfig(**SIZES, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
}
BASE = Candidate(micro_batch_size=1, max_seq_length=256, lora_rank=4, lora_targets=("all-linear",), loss="full")
MICRO_BATCHES = [(1, 256), (4, 256), (3, 512), (2, 768), (1, 1024)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        config.save_pretrained(folder / name)
    return {name: ModelSource(model=str(folder / name), random_weights=True) for name in MODELS}


@pytest.fixture
def traces(monkeypatch):
    """(rows, length) of every trace that is made."""
    made = []
    derive._shared_trace.cache_clear()
    derive._checked.clear()
    genuine = estimating.trace_candidate

    def counted(candidate, *args, **more):
        made.append((candidate.micro_batch_size, candidate.max_seq_length))
        return genuine(candidate, *args, **more)

    monkeypatch.setattr(estimating, "trace_candidate", counted)
    return made


def of(base, *micro_batches):
    return [base.replace(micro_batch_size=rows, max_seq_length=length) for rows, length in micro_batches]


@pytest.mark.parametrize("device", [H200, T4, CPU], ids=["h200", "t4", "cpu"])
@pytest.mark.parametrize("name", ["llama", "capped", "fused", "learned-positions"])
def test_derived_equals_traced(sources, traces, name, device):
    dtype = "float32" if device is CPU else "float16" if device is T4 else "bfloat16"
    base = BASE.replace(dtype=dtype, attention="eager" if name == "capped" else "sdpa")
    for layers in (0, 2):
        candidates = of(base.replace(checkpointed_layers=layers), *MICRO_BATCHES)
        check(candidates, sources[name], device)
    # One for each number of layers, one or two to see whether it tells the truth, and a single row where it does not.
    assert len(traces) - 2 * len(MICRO_BATCHES) <= (4 if name == "llama" and device is not T4 else 10)


def check(candidates, source, device):
    for candidate, found in zip(candidates, estimate_many(candidates, source, device), strict=True):
        traced = estimate(candidate, source, device)
        assert (found.peak_allocated_bytes, found.paged_bytes) == (traced.peak_allocated_bytes, traced.paged_bytes)
        assert found.peak_phase == traced.peak_phase
        if device is not CPU:
            assert found.tokens_per_second == pytest.approx(traced.tokens_per_second, rel=0.2)


def test_quantized_and_chunked_as_well(sources):
    base = BASE.replace(quantization_bits=4, loss="chunked", accumulates=True, optimizer="paged_adamw_32bit")
    check(of(base, (1, 512), (2, 2048), (1, 8192)), sources["llama"], H200)


@pytest.mark.parametrize("offload", ["none", "all"])
def test_packed_rows_of_any_size_share_one(sources, traces, offload):
    base = BASE.replace(layout="packed", loss="chunked", quantization_bits=4, offload_activations=offload)
    candidates = of(base, (1, 256), (3, 1937), (2, 2048))
    check(candidates, sources["llama"], H200)
    if offload == "none":
        assert len(traces) <= 3 + len(candidates)


def test_on_a_cpu_packed_rows_are_looked_at_one_by_one(sources):
    check(of(BASE.replace(layout="packed", dtype="float32"), (1, 256), (2, 200)), sources["llama"], CPU)


@pytest.mark.parametrize("device", [H200, CPU], ids=["h200", "cpu"])
def test_layers_that_loop_over_the_length_share_no_trace_between_lengths(sources, device):
    base = BASE.replace(dtype="float32" if device is CPU else "bfloat16")
    check(of(base, *MICRO_BATCHES), sources["linear-attention"], device)


def test_either_side_of_a_window_is_traced_apart(sources, traces):
    check(of(BASE, (1, 256), (2, 256), (1, 512), (1, 1024), (2, 2048)), sources["window"], H200)
    templates = {length for rows, length in traces if rows > 4}
    assert templates == {256, 7424}  # up to the window no length of a prime fits


def test_lengths_that_kernels_round_up_are_traced_apart(sources, traces):
    check(of(BASE, (1, 100), (2, 100), (3, 100), (1, 256), (2, 512)), sources["llama"], H200)
    assert {length for rows, length in traces if rows > 4} == {100, 7424}


def test_where_values_decide_each_is_estimated(sources):
    candidates = of(BASE, (1, 256), (2, 256))
    derived = estimate_many(candidates, sources["experts"], H200)
    assert [found.bracket for found in derived] == [
        estimate(candidate, sources["experts"], H200).bracket for candidate in candidates
    ]


def test_what_rules_a_candidate_out_stands_in_its_place(sources):
    good, bad = BASE, BASE.replace(checkpointed_layers=9)
    answers = estimate_many([good, bad, bad.replace(micro_batch_size=2)], sources["llama"], H200)
    assert answers[0].peak_allocated_bytes > 0
    assert [str(answer) for answer in answers[1:]] == ["checkpointed_layers 9: the model has only 4"] * 2
    assert isinstance(answers[1], UsageError)


def test_processes_side_by_side_say_the_same(sources):
    candidates = [c for layers in (0, 2, 4) for c in of(BASE.replace(checkpointed_layers=layers), *MICRO_BATCHES[:3])]
    calibration = Calibration(context_bytes=5, allocated_bytes=512, speed=0.5)
    alone = estimate_many(candidates, sources["llama"], H200, calibration)
    with side_by_side() as pool:
        together = estimate_many(candidates, sources["llama"], H200, calibration, pool)
    assert together == alone


@pytest.mark.parametrize("optimizer", ["adamw_torch", "paged_adamw_32bit"])
def test_numbers_of_checkpointed_layers_share_a_trace(sources, traces, optimizer):
    base = BASE.replace(checkpointed_layers=1, optimizer=optimizer, lora_rank=2048 if "paged" in optimizer else 4)
    candidates = [c for n in (6, 7) for c in of(base.replace(checkpointed_layers=n), (1, 256), (4, 256))]
    found = estimate_many(candidates, sources["deep"], H200)
    assert len([rows for rows, _ in traces if rows > 4]) == 1
    for candidate, estimated in zip(candidates, found, strict=True):
        traced = estimate(candidate, sources["deep"], H200)
        assert estimated.peak_allocated_bytes == traced.peak_allocated_bytes
        assert estimated.peak_phase == traced.peak_phase
        assert estimated.paged_bytes == traced.paged_bytes
        assert (traced.paged_bytes > 0) == ("paged" in optimizer)


def test_a_trace_that_serves_one_number_only_is_made_for_each(sources, traces, monkeypatch):
    monkeypatch.setattr(tracing, "shared_row", lambda rows, reach: None)
    candidates = [c for n in (4, 5) for c in of(BASE.replace(checkpointed_layers=n), (1, 256), (4, 256))]
    found = estimate_many(candidates, sources["deep"], H200)
    assert len([rows for rows, _ in traces if rows > 4]) == 2
    assert [f.peak_allocated_bytes for f in found] == [
        estimate(candidate, sources["deep"], H200).peak_allocated_bytes for candidate in candidates
    ]
