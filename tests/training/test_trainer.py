"""The full training loop runs the one step, on the model as it was built, and its result does not depend on the cut."""

import itertools
import json
import os
import signal

import pytest
import torch
from datasets import Dataset

from autofit.errors import OutOfBudget
from autofit.memory.meter import open_meter
from autofit.space.candidate import Candidate
from autofit.step.batch import collate, trained_tokens
from autofit.step.model import build_model
from autofit.step.optimizer import build_optimizer
from autofit.step.policy import resolve_policy
from autofit.step.step import build_step
from autofit.training.arguments import training_arguments
from autofit.training.child import RunRecord, _run
from autofit.training.recovery.stopping import Stopped
from autofit.training.request import Schedule
from autofit.training.trainer import NonFiniteLoss, StepTrainer
from autofit.trial.phases import PhaseReport
from tests.conftest import CPU
from tests.training.recovery.conftest import FailingAllocations
from tests.training.recovery.forked import Disk, forked

CANDIDATE = Candidate(micro_batch_size=8, max_seq_length=64, dtype="float32", checkpointed_layers=2)


def schedule(**changes):
    values = {
        "global_batch_size": 8,
        "num_train_epochs": 1,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "save_steps": 100,
        "seed": 3,
        "evaluate": False,
    }
    return Schedule(**{**values, **changes})


def dataset(count=40):
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 64, (count,), generator=draw).tolist()
    ids = [torch.randint(0, 256, (n,), generator=draw).tolist() for n in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100] * (len(i) // 3) + i[len(i) // 3 :] for i in ids]})


def trainer(source, folder, candidate=CANDIDATE, **changes):
    folder.mkdir(exist_ok=True)
    policy = resolve_policy(candidate, CPU)
    step = build_step(candidate, source, policy, lora_alpha=32, seed=3)
    plan = schedule(**changes)
    record = RunRecord(folder, PhaseReport(), open_meter("cpu", None))
    made = StepTrainer(
        step,
        candidate,
        0,
        training_arguments(plan, folder, "cpu", num_eval_examples=20),
        train_dataset=dataset(),
        eval_dataset=dataset(20) if plan.evaluate else None,
        optimizers=(build_optimizer(step.model, candidate, policy, plan.learning_rate), None),
        callbacks=[record],
    )
    return made, record


def adapters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


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
    assert record.losses() == losses(tmp_path)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.3


def test_evaluation_is_the_mean_loss_of_the_same_step(tiny_source, tmp_path):
    made, _ = trainer(tiny_source, tmp_path, CANDIDATE.replace(micro_batch_size=2), evaluate=True)
    rows = list(dataset(20))
    metrics = made.evaluate()
    whole = float(made.step.evaluate(collate(rows, 0))) / trained_tokens(rows)
    assert metrics["eval_loss"] == pytest.approx(whole, rel=1e-5)


def signal_once(made, step):
    """A report that sends one signal; another thread may get it, so Python may heed it a moment later."""
    sent = []

    def report(phase):
        if made.state.global_step == step and not sent:
            sent.append(phase)
            os.kill(os.getpid(), signal.SIGTERM)

    return report


def test_a_stop_saves_at_the_next_step_and_the_rest_of_the_run_is_the_same(tiny_source, tmp_path):
    undisturbed, _ = trainer(tiny_source, tmp_path / "undisturbed")
    undisturbed.train()

    stopped, _ = trainer(tiny_source, tmp_path / "stopped")
    stopped.step.report = signal_once(stopped, 1)
    with pytest.raises(Stopped):
        stopped.train()
    assert stopped.state.global_step == 2

    resumed, _ = trainer(tiny_source, tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for name, parameter in adapters(undisturbed.model).items():
        assert torch.equal(parameter, adapters(resumed.model)[name])
    assert losses(tmp_path / "stopped") == losses(tmp_path / "undisturbed")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tiny_source, tmp_path, value):
    made, _ = trainer(tiny_source, tmp_path, save_steps=1)
    micro_batch = made.step.micro_batch

    def poisoned(batch, normalizer):
        loss = micro_batch(batch, normalizer)
        return loss * value if made.state.global_step == 2 else loss

    made.step.micro_batch = poisoned
    with pytest.raises(NonFiniteLoss, match="step 3"):
        made.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_gradients_that_are_not_finite_stop_the_run_before_they_are_saved(tiny_source, tmp_path):
    made, _ = trainer(tiny_source, tmp_path, save_steps=1)
    micro_batch = made.step.micro_batch

    def poisoned(batch, normalizer):
        loss = micro_batch(batch, normalizer)
        if made.state.global_step == 2:
            next(p for p in made.model.parameters() if p.grad is not None).grad[0, 0] = float("nan")
        return loss

    made.step.micro_batch = poisoned
    with pytest.raises(NonFiniteLoss, match="norm became nan at step 3"):
        made.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_run_whose_last_checkpoint_is_complete_trains_no_step_more(tiny_source, tmp_path):
    made, record = trainer(tiny_source, tmp_path, save_steps=2)
    assert _run(made, record, tmp_path) == (4, True)
    end = adapters(made.model)
    again, record = trainer(tiny_source, tmp_path, save_steps=2)
    assert _run(again, record, tmp_path) == (4, True)
    assert all(torch.equal(p, end[name]) for name, p in adapters(again.model).items())
    assert len(losses(tmp_path)) == 4


def test_a_torn_checkpoint_is_passed_over_and_its_steps_are_taken_again(tiny_source, tmp_path):
    undisturbed, _ = trainer(tiny_source, tmp_path / "undisturbed")
    undisturbed.train()
    killed, record = trainer(tiny_source, tmp_path / "killed", save_steps=1)
    killed.step.report = signal_once(killed, 2)
    assert _run(killed, record, tmp_path / "killed") == (3, False)
    (tmp_path / "killed" / "checkpoint-3" / "trainer_state.json").write_text('{"torn')
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    resumed, record = trainer(tiny_source, tmp_path / "killed")
    assert _run(resumed, record, tmp_path / "killed") == (4, True)
    assert losses(tmp_path / "killed") == losses(tmp_path / "undisturbed")
    for name, parameter in adapters(undisturbed.model).items():
        assert torch.equal(parameter, adapters(resumed.model)[name])


def test_killed_in_a_save_it_goes_on_with_other_lossless_knobs(tiny_source, tmp_path):
    undisturbed, _ = trainer(tiny_source, tmp_path / "undisturbed")
    undisturbed.train()
    folder = tmp_path / "killed"

    def killed():
        made, record = trainer(tiny_source, folder, save_steps=1)
        disk = Disk(folder)
        made.step.report = lambda phase: setattr(disk, "at", disk.count + 12 if made.state.global_step == 2 else None)
        _run(made, record, folder)

    assert forked(killed) == -signal.SIGKILL
    assert (folder / "_saving" / "checkpoint-3").is_dir()
    knobs = {"micro_batch_size": 1, "checkpointed_layers": 4}
    resumed, record = trainer(tiny_source, folder, CANDIDATE.replace(**knobs), save_steps=3)
    assert _run(resumed, record, folder) == (4, True)
    assert [path.name for path in sorted(folder.glob("*checkpoint*"))] == ["checkpoint-3", "checkpoint-4"]
    end = adapters(resumed.model)
    assert all(torch.allclose(p, end[name], atol=1e-4) for name, p in adapters(undisturbed.model).items())


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


def faulty(made, allocations):
    """Trains while these allocations fail; the trainer's own adapters afterwards."""
    counter = FailingAllocations(allocations)
    with counter:
        made.train()
    return adapters(made.model), counter.count


@pytest.mark.parametrize("layers", [0, 2])
def test_an_out_of_memory_inside_training_changes_nothing(tiny_source, tmp_path, layers):
    candidate = CANDIDATE.replace(checkpointed_layers=layers, lora_dropout=0.1)
    undisturbed, _ = trainer(tiny_source, tmp_path / "undisturbed", candidate, max_steps=2)
    expected, count = faulty(undisturbed, ())
    for number in range(count // 12, count, count // 6):
        made, _ = trainer(tiny_source, tmp_path / str(number), candidate, max_steps=2)
        found, _ = faulty(made, {number})
        assert all(torch.equal(expected[n], found[n]) for n in expected), number
        assert losses(tmp_path / str(number)) == losses(tmp_path / "undisturbed")
        assert [event["event"] for event in made.recovery.events] == ["oom"]


def test_an_out_of_memory_in_clipping_changes_nothing(tiny_source, tmp_path):
    undisturbed, _ = trainer(tiny_source, tmp_path / "undisturbed", max_steps=1)
    clip, seen = undisturbed._whole, []
    with FailingAllocations(least=1) as counter:
        undisturbed._whole = lambda *args: (seen.append(counter.count), clip(*args), seen.append(counter.count))[1]
        undisturbed.train()
    first, end = seen[:2]
    assert end - first > 20
    for number in (first, (first + end) // 2, end - 1):
        made, _ = trainer(tiny_source, tmp_path / str(number), max_steps=1)
        with FailingAllocations({number}, least=1):
            made.train()
        expected, found = adapters(undisturbed.model), adapters(made.model)
        assert all(torch.equal(expected[n], found[n]) for n in expected), number
        assert [event["phase"] for event in made.recovery.events] == ["clipping"]


def out_of_memory(model, batch):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_step_that_does_not_fit_is_cut_and_then_given_up(tiny_source, tmp_path):
    whole, _ = trainer(tiny_source, tmp_path / "whole", max_steps=2)
    expected, count = faulty(whole, ())
    cut, _ = trainer(tiny_source, tmp_path / "cut", max_steps=2)
    found, _ = faulty(cut, {count // 4, count // 4 + 60})
    assert all(torch.allclose(expected[n], found[n], atol=1e-4) for n in expected)
    assert [event["did"][:3] for event in cut.recovery.events] == ["fre", "cut"]
    lines = (tmp_path / "cut" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["oom", "oom"]
    hopeless, _ = trainer(tiny_source, tmp_path / "hopeless", max_steps=2)
    hopeless.step.loss = out_of_memory
    with pytest.raises(OutOfBudget, match=r"step 1 does not fit: a sequence of \d+ tokens alone"):
        hopeless.train()


def test_evaluation_that_does_not_fit_is_tried_again_then_cut_and_leaves_training_alone(tiny_source, tmp_path):
    made, _ = trainer(tiny_source, tmp_path, evaluate=True)
    expected = made.evaluate()["eval_loss"]
    with FailingAllocations({40}):
        assert made.evaluate()["eval_loss"] == expected
    with FailingAllocations({40, 60}):
        assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert [event["did"][:3] for event in made.recovery.events] == ["fre", "fre", "cut"]
    assert made.evaluate()["eval_loss"] == expected
    assert made._most_tokens is None


def test_a_signal_in_an_evaluation_ends_it_between_its_micro_batches(tiny_source, tmp_path):
    """All examples are one prediction step here."""
    candidate = CANDIDATE.replace(micro_batch_size=1, lora_dropout=0.1)
    given = {"evaluate": True, "max_steps": 8, "save_steps": 100}
    undisturbed, _ = trainer(tiny_source, tmp_path / "undisturbed", candidate, **given)
    undisturbed.train()
    folder = tmp_path / "run"

    def stopped():
        made, record = trainer(tiny_source, folder, candidate, **given)
        evaluate, count = made.step.evaluate, itertools.count(1)

        def signalled(batch):
            number = next(count)
            if number <= 2:
                os.kill(os.getpid(), signal.SIGTERM if number == 1 else signal.SIGKILL)
            return evaluate(batch)

        made.step.evaluate = signalled
        assert _run(made, record, folder) == (5, False)

    assert forked(stopped) == 0
    (checkpoint,) = folder.glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-5"  # an epoch's last step
    resumed, record = trainer(tiny_source, folder, candidate, **given)
    assert _run(resumed, record, folder) == (8, True)
    for name, parameter in adapters(undisturbed.model).items():
        assert torch.equal(parameter, adapters(resumed.model)[name])
