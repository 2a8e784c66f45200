"""Training that is stopped, killed or goes wrong: the rest of the run is the same, from the last whole checkpoint."""

import os
import signal

import pytest
import torch

from autofit.training.child import _run
from autofit.training.recovery.stopping import Stopped
from autofit.training.trainer import NonFiniteLoss
from tests.training.recovery.forked import Disk, forked
from tests.training.trainers import CANDIDATE, adapters, losses, trainer


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
