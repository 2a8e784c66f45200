"""The full training loop runs the one step, on the model as it was built, and its result does not depend on the cut."""

import pytest
import torch
from datasets import Dataset

from autofit.memory.meter import open_meter
from autofit.step.batch import collate, trained_tokens
from autofit.step.model import build_model
from autofit.step.policy import resolve_policy
from autofit.trial.phases import PhaseReport
from tests.conftest import CPU
from tests.training.trainers import CANDIDATE, adapters, dataset, losses, trainer


def describe(model):
    """What a Trainer likes to change: types, flags and forwards of every module."""
    modules = {
        name: (type(m).__name__, getattr(m, "gradient_checkpointing", None), m.training, m.__dict__.get("forward"))
        for name, m in model.named_modules()
    }
    parameters = {name: (p.dtype, p.requires_grad, p.device.type) for name, p in model.named_parameters()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    return modules, parameters, hooks


@pytest.mark.parametrize("bits", [16, 4])
def test_at_the_first_forward_inside_train_the_model_is_as_it_was_built(tiny_source, tmp_path, monkeypatch, bits):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # what an accelerate config would set
    candidate = CANDIDATE.replace(quantization_bits=bits)
    built = describe(build_model(candidate, tiny_source, resolve_policy(candidate, CPU), lora_alpha=32, seed=3))
    made, _ = trainer(tiny_source, tmp_path, candidate, max_steps=1)
    seen = []
    forward = made.step.micro_batch

    def spy(batch, normalizer):
        seen.append((describe(made.model), torch.is_autocast_enabled("cpu"), made.accelerator.mixed_precision))
        return forward(batch, normalizer)

    made.step.micro_batch = spy
    made.train()
    model, autocast, mixed_precision = seen[0]
    assert model == built
    assert not autocast
    assert mixed_precision == "no"
    assert made.model is made.step.model


def test_evaluating_leaves_four_bit_weights_as_they_are(tiny_source, tmp_path):
    """Some CPUs have bitsandbytes pack them anew, and a backward that takes them for what they were."""
    found = []
    for evaluates in (False, True):
        made, _ = trainer(tiny_source, tmp_path / str(evaluates), CANDIDATE.replace(quantization_bits=4), evaluate=True)
        if evaluates:
            made.evaluate()
        made.train()
        found.append(adapters(made.model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_cut_changes_neither_losses_nor_weights(tiny_source, tmp_path):
    whole, _ = trainer(tiny_source, tmp_path / "whole")
    whole.train()
    start = adapters(build_model(CANDIDATE, tiny_source, resolve_policy(CANDIDATE, CPU), lora_alpha=32, seed=3))
    end = adapters(whole.model)
    travelled = sum((end[n] - start[n]).norm() ** 2 for n in end).sqrt()
    fine, _ = trainer(tiny_source, tmp_path / "fine", CANDIDATE.replace(micro_batch_size=1))
    fine.train()
    apart = sum((end[n] - p).norm() ** 2 for n, p in adapters(fine.model).items()).sqrt()
    assert travelled > 0.1
    assert apart <= 1e-4 * travelled
    assert losses(tmp_path / "fine") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert whole.state.global_step == fine.state.global_step == 4


def test_the_loss_falls_and_every_step_is_on_record(tiny_source, tmp_path):
    made, record = trainer(tiny_source, tmp_path, max_steps=20)
    made.train()
    assert len(losses(tmp_path)) == 20
    assert record.losses("loss") == losses(tmp_path)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.3


def test_evaluation_is_the_mean_loss_of_the_same_step(tiny_source, tmp_path):
    made, _ = trainer(tiny_source, tmp_path, CANDIDATE.replace(micro_batch_size=2), evaluate=True)
    rows = list(dataset(20))
    metrics = made.evaluate()
    whole = float(made.step.evaluate(collate(rows, 0))) / trained_tokens(rows)
    assert metrics["eval_loss"] == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("pace", [{}, {"micro_batch_size": 1, "pace_length": 24}], ids=["all alike", "alone"])
def test_training_on_nothing_but_the_longest_stays_within_its_trial(tiny_source, tmp_path, pace):
    from autofit.trial.child import run_trial
    from autofit.trial.request import TrialRequest

    candidate = CANDIDATE.replace(**{"micro_batch_size": 3, "accumulates": True, **pace})
    request = TrialRequest(
        candidate=candidate,
        source=tiny_source,
        device=CPU,
        cap_bytes=10**9,
        budget_bytes=10**9,
        lora_alpha=32,
        seed=3,
    )
    worst = run_trial(request.to_json(), PhaseReport())["device_bytes"]
    waiting = 8 * 3 * 64 * 8  # a step's sequences, ids and positions and targets, on the host: here it is the device
    with open_meter("cpu", worst + waiting) as meter:
        made, _ = trainer(tiny_source, tmp_path, candidate)
        made.train_dataset = Dataset.from_dict({"input_ids": [list(range(64))] * 40, "labels": [list(range(64))] * 40})
        meter.hold([*made.model.parameters(), *made.model.buffers()])
        made.train()
    assert made.state.global_step == 4
    assert meter.peaks().device_bytes > 0.9 * worst
