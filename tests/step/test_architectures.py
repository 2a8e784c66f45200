"""Families of every kind through the one builder: the loss is right, layers recompute, adapters keep their names."""

import pytest
import torch

from autofit.errors import UsageError
from autofit.memory.estimate import estimate
from autofit.space.candidate import Candidate
from autofit.space.settle import settle
from autofit.space.source import ModelSource
from autofit.step.batch import worst_micro_batches
from autofit.step.inspect import inspect_model
from autofit.step.policy import resolve_policy
from autofit.step.step import build_step
from autofit.step.targets import lora_targets_used
from autofit.trial.phases import PhaseReport
from autofit.trial.probe import run_probe
from benchmarks.loss_check import loss_difference
from benchmarks.tiny_architectures import tiny_config
from tests.conftest import CPU

FAMILIES = {
    "llama": "grouped-query",
    "gemma": "tied",
    "gpt2": "biased, Conv1D",
    "gpt_neox": "parallel residual",
    "mistral": "sliding window",
    "gemma2": "soft caps, two kinds of layers",
    "granite": "scaled logits",
    "cohere": "scaled logits, tied",
    "mixtral": "mixture of experts",
    "deepseek_v3": "latent attention, shared experts",
    "mamba2": "state space",
    "jamba": "hybrid with experts",
    "recurrent_gemma": "recurrent, capped logits",
    "inkling_text": "divided logits, padded vocabulary",
}


def source(model_type, folder):
    tiny_config(model_type).save_pretrained(folder)
    return ModelSource(model=str(folder), random_weights=True)


def settled(model_type, folder, **asked):
    model = source(model_type, folder)
    asked = {"micro_batch_size": 2, "max_seq_length": 48, **asked}
    candidate, notes = settle(asked, inspect_model(model), CPU, "float32")
    return candidate, model, notes


def gradients(candidate, model):
    step = build_step(candidate, model, resolve_policy(candidate, CPU), lora_alpha=32, seed=0)
    for name, parameter in step.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    step.accumulate(worst_micro_batches(96, 48, 256), 94)
    return {n: p.grad for n, p in step.model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chunked_loss_is_the_full_one(family, tmp_path):
    difference = loss_difference(tiny_config(family), tmp_path)
    assert difference is not None
    assert difference < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_layers_give_the_same_gradients(family, tmp_path):
    plain, model, _ = settled(family, tmp_path)
    every, _, _ = settled(family, tmp_path, checkpointed_layers="all")
    assert every.checkpointed_layers > 0
    kept, recomputed = gradients(plain, model), gradients(every, model)
    assert kept.keys() == recomputed.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_that_are_answered_adapt_the_same_layers(family, tmp_path):
    candidate, model, _ = settled(family, tmp_path)

    def adapters(targets):
        one = candidate.replace(lora_targets=targets)
        built = build_step(one, model, resolve_policy(one, CPU), lora_alpha=32, seed=0).model
        return lora_targets_used(built), {n: p.shape for n, p in built.named_parameters() if p.requires_grad}

    names, all_linear = adapters(("all-linear",))
    assert adapters(tuple(names)) == (names, all_linear)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", ["none", "all"])
def test_the_estimate_is_what_the_probe_counts(family, layers, tmp_path):
    """To the byte."""
    candidate, model, _ = settled(family, tmp_path, checkpointed_layers=layers)
    request = {"model": model.model, "trust_remote_code": False, "device": "cpu", "gpu_mem": None, "seed": 0}
    probed = run_probe({**request, "asked": candidate.to_json()}, PhaseReport())["peak_allocated_bytes"]
    found = estimate(candidate, model, CPU)
    assert found.peak_allocated_bytes == probed
    assert found.bracket is None  # however rows are routed


@pytest.mark.parametrize("family", ["bert", "roberta", "prophetnet"])
def test_logits_that_are_no_single_product_take_the_full_loss(family, tmp_path):
    candidate, model, notes = settled(family, tmp_path)
    assert candidate.loss == "full"
    assert "loss full" in notes[0]
    assert gradients(candidate, model)
    chunked = candidate.replace(loss="chunked")
    with pytest.raises(UsageError, match="use loss: full"):
        build_step(chunked, model, resolve_policy(chunked, CPU), lora_alpha=32, seed=0)


@pytest.mark.parametrize("family", ["git", "xlstm"])
def test_embeddings_changed_in_place_and_models_within_models_can_be_built(family, tmp_path):
    candidate, model, _ = settled(family, tmp_path, checkpointed_layers="all")
    assert gradients(candidate, model)


def test_inputs_require_no_gradients_where_layers_recompute(tmp_path):
    candidate = Candidate(micro_batch_size=1, max_seq_length=8, dtype="float32", checkpointed_layers=2)
    model = source("llama", tmp_path)
    step = build_step(candidate, model, resolve_policy(candidate, CPU), lora_alpha=32, seed=0)
    assert not step.model.get_input_embeddings()(torch.zeros(1, 4, dtype=torch.int64)).requires_grad
