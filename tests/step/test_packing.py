"""Several sequences in a row: the gradient of the padded layout, and memory that the row's tokens decide."""

from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autofit.errors import UsageError
from autofit.memory.estimate import estimate
from autofit.memory.forecast import run_forecast
from autofit.space.candidate import Candidate
from autofit.space.cut import most_sequences
from autofit.space.facts import DeviceFacts
from autofit.space.settle import settle
from autofit.space.source import ModelSource
from autofit.step.batch import IGNORED, collate, collate_packed, micro_batches, trained_tokens, worst_packed
from autofit.step.inspect import inspect_model
from autofit.step.packing import packed_attention
from autofit.step.policy import resolve_policy
from autofit.step.step import build_step
from autofit.trial.child import run_trial
from autofit.trial.phases import PhaseReport
from autofit.trial.probe import run_probe
from autofit.trial.request import TrialRequest
from benchmarks.tiny_architectures import tiny_config
from tests.conftest import CPU
from tests.step.test_step import example, gradients

PACKED = Candidate(micro_batch_size=8, max_seq_length=64, dtype="float32", layout="packed")
LENGTHS = (48, 30, 5, 23, 37, 2, 11)
# Some of each kind that can: a window, experts, learned positions, parallel residuals, norms on heads.
# Those with state, biases or capped scores cannot.
CAN = ("llama", "mistral", "gemma3_text", "granitemoe", "qwen3_moe", "gpt_neox", "opt", "cohere2", "phi3", "olmo2")
CANNOT = (
    "gemma2",
    "gpt2",
    "bloom",
    "mamba2",
    "jamba",
    "deepseek_v3",
    "gpt_oss",
    "llama4_text",
    "qwen3_next",
    "gemma4_text",
)


def examples(lengths=LENGTHS):
    return [example(n, n // 3, seed) for seed, n in enumerate(lengths)]


def built(candidate, source):
    return build_step(candidate, source, resolve_policy(candidate, CPU), lora_alpha=32, seed=0)


@pytest.fixture(scope="module")
def steps(tiny_source):
    return built(PACKED.replace(layout="padded"), tiny_source), built(PACKED, tiny_source)


def test_a_packed_row_says_where_each_sequence_begins():
    batch = collate_packed(
        [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    )
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert batch.packing.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.packing.starts.tolist() == [0, 3, 5]
    assert batch.packing.starts.dtype is torch.int32
    assert batch.positions.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [2, 3, 5]


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(2, 64), min_size=1, max_size=12), budget=st.integers(64, 1024))
def test_the_gradient_is_the_padded_ones(steps, lengths, budget):
    padded, packed = steps
    rows = examples(lengths)
    count = trained_tokens(rows)
    loss, expected = gradients(padded, [collate(rows, 0)], count)
    other, found = gradients(packed, micro_batches(rows, budget, 0, "packed"), count)
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=1e-7)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_evaluation_is_the_padded_ones(steps):
    rows = examples()
    padded, packed = steps
    assert float(packed.evaluate(collate_packed(rows))) == pytest.approx(
        float(padded.evaluate(collate(rows, 0))), rel=1e-6
    )


def test_recomputed_layers_know_the_sequences_too(steps, tiny_source):
    recomputing = built(PACKED.replace(checkpointed_layers=4), tiny_source)
    rows = examples()
    _, expected = gradients(steps[1], [collate_packed(rows)], 100)
    _, found = gradients(recomputing, [collate_packed(rows)], 100)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", CAN)
def test_families_that_can_pack_have_the_padded_gradient(family, tmp_path):
    tiny_config(family).save_pretrained(tmp_path)
    source = ModelSource(model=str(tmp_path), random_weights=True)
    candidate, _ = settle(
        {"layout": "packed", "micro_batch_size": 8, "max_seq_length": 48}, inspect_model(source), CPU, "float32"
    )
    rows = examples()
    count = trained_tokens(rows)
    found = []
    apart, first_alone = [collate([row], 0) for row in rows], [collate(rows[:1], 0), collate_packed(rows[1:])]
    for layout, batches in (("padded", apart), ("packed", [collate_packed(rows)]), ("packed", first_alone)):
        step = built(candidate.replace(layout=layout), source)
        step.model.eval()  # hidden states may be dropped, and routers are jittered
        found.append(gradients(step, batches, count)[1])
    for other in found[1:]:
        assert (other - found[0]).norm() <= 1e-6 * found[0].norm()


@pytest.mark.parametrize("family", CANNOT)
def test_families_whose_attention_does_more_do_not_pack(family, tmp_path):
    tiny_config(family).save_pretrained(tmp_path)
    facts = inspect_model(ModelSource(model=str(tmp_path), random_weights=True))
    assert facts.packed_head_size is None
    with pytest.raises(UsageError, match=f"layout packed: the attention of {facts.architecture} cannot"):
        settle({"layout": "packed"}, facts, CPU, "float32")


def test_what_the_attention_does_not_do_is_not_left_out():
    query = torch.zeros(1, 1, 4, 8)
    with pytest.raises(NotImplementedError, match="mask"):
        packed_attention(None, query, query, query, torch.zeros(4, 4))
    with pytest.raises(NotImplementedError, match="no packing"):
        packed_attention(None, query, query, query, None)


@given(budget=st.integers(1, 3000), longest=st.integers(1, 3000))
def test_the_costliest_row_has_all_tokens_and_as_many_sequences_as_may_be(budget, longest):
    candidate = PACKED.replace(micro_batch_size=1, max_seq_length=longest, tokens_per_micro_batch=min(budget, longest))
    batch = worst_packed(candidate.token_budget, longest, vocabulary=50)
    tokens = batch.input_ids.numel()
    assert max(candidate.token_budget, longest) <= tokens < max(budget, longest) + 64
    assert sum(batch.packing.lengths) == tokens
    assert min(batch.packing.lengths) >= 1
    assert len(batch.packing.lengths) == most_sequences(tokens)
    assert batch.targets.numel() == tokens


@pytest.mark.parametrize("layers", [0, 2])
def test_the_estimate_is_what_the_probe_counts(tiny_source, layers):
    """To the byte."""
    source = ModelSource(model=tiny_source.model, random_weights=True)
    asked = {"layout": "packed", "micro_batch_size": 5, "max_seq_length": 64, "checkpointed_layers": layers}
    candidate, _ = settle(asked, inspect_model(source), CPU, "float32")
    request = {"model": source.model, "trust_remote_code": False, "device": "cpu", "gpu_mem": None, "seed": 0}
    probed = run_probe({**request, "asked": candidate.to_json()}, PhaseReport())["peak_allocated_bytes"]
    assert estimate(candidate, source, CPU).peak_allocated_bytes == probed


def test_a_long_sequence_alone_is_estimated_beside_the_packed_rows(tiny_source):
    """The trial runs both kinds, and holds the batches of both; the estimate takes whichever needs most."""
    source = ModelSource(model=tiny_source.model, random_weights=True)
    for rows, longest in ((1, 300), (2, 200)):
        candidate = PACKED.replace(micro_batch_size=rows, max_seq_length=longest, pace_length=64)
        forms = {"candidates": [c.to_json() for c in (candidate, candidate.usual(), candidate.alone(4, False))]}
        request = {**forms, "source": asdict(source), "device": CPU.to_json(), "calibration": None}
        told = run_forecast({**request, "checkpointable_layers": 4}, PhaseReport())["estimates"]
        assert told[0]["peak_allocated_bytes"] == max(one["peak_allocated_bytes"] for one in told[1:])
        trial = TrialRequest(
            candidate=candidate,
            source=source,
            device=CPU,
            cap_bytes=10**9,
            budget_bytes=10**9,
            lora_alpha=32,
            seed=0,
        )
        measured = run_trial(trial.to_json(), PhaseReport())["peak_allocated_bytes"]
        assert measured == pytest.approx(told[0]["peak_allocated_bytes"], rel=2e-3)


def test_a_candidate_goes_through_json_as_it_is():
    candidate = PACKED.replace(max_seq_length=1937, micro_batch_size=3)
    assert Candidate.from_json(candidate.to_json()) == candidate
    assert candidate.token_budget == 5824  # whole blocks


@pytest.mark.parametrize(
    ("capability", "dtype", "fits"),
    [((8, 0), "bfloat16", True), ((9, 0), "float32", False), ((7, 5), "float16", False), ((8, 9), "float16", True)],
)
def test_cards_before_ampere_and_float32_do_not_pack(tiny_source, capability, dtype, fits):
    device = DeviceFacts(type="cuda", name="card", total_bytes=2**34, compute_capability=capability)
    facts = inspect_model(ModelSource(model=tiny_source.model, random_weights=True))
    asked = {"layout": "packed", "dtype": dtype, "micro_batch_size": 1}
    if fits:
        assert settle(asked, facts, device, dtype)[0].layout == "packed"
    else:
        with pytest.raises(UsageError, match="card has no such attention"):
            settle(asked, facts, device, dtype)
