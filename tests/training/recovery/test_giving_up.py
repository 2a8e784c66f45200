"""Wherever a step does not fit, the last completed one is saved, and a run goes on from it as if undisturbed."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from autofit.errors import OutOfBudget
from autofit.training.recovery.trainers import AutoFitTrainer
from tests.training.recovery.conftest import pad, same, weights

# Epochs of eight steps.
GIVEN = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 12,
    "include_num_input_tokens_seen": "all",
}
SAVES = {"save_strategy": "steps", "save_steps": 100}


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def gone_in_passes(trainer, monkeypatch, is_gone):
    trainer.model.model.layers[0].register_forward_pre_hook(lambda *_: out_of_memory() if is_gone() else None)


def gone_in_clipping(trainer, monkeypatch, is_gone):
    genuine = nn.utils.get_total_norm
    monkeypatch.setattr(nn.utils, "get_total_norm", lambda *a: out_of_memory() if is_gone() else genuine(*a))


def gone_in_a_clip_of_somebody_s_own(trainer, monkeypatch, is_gone):
    monkeypatch.setattr(Trainer, "_clip_grad_norm", lambda *a: out_of_memory() if is_gone() else None)


def gone_in_the_optimizer(trainer, monkeypatch, is_gone, moves=False):
    genuine = torch.optim.AdamW.step

    def step(self, closure=None):
        if not is_gone():
            return genuine(self, closure)
        if moves:
            with torch.no_grad():
                self.param_groups[0]["params"][0].mul_(0.5)
        out_of_memory()

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


def gone_half_way_in_the_optimizer(trainer, monkeypatch, is_gone):
    gone_in_the_optimizer(trainer, monkeypatch, is_gone, moves=True)


def gone_in_the_fetch(trainer, monkeypatch, is_gone):
    trainer.data_collator = lambda rows: out_of_memory() if is_gone() else pad(rows)


def gone_after_the_optimizer(trainer, monkeypatch, is_gone):
    monkeypatch.setattr(Trainer, "_get_learning_rate", lambda self: out_of_memory() if is_gone() else 0.0)


def given_up(made, model, monkeypatch, gone, step, **given):
    """The steps that are saved by a training in which memory is gone from a step on."""
    ours = made(AutoFitTrainer, model, **{**GIVEN, **SAVES, **given})
    with monkeypatch.context() as patch:
        gone(ours, patch, lambda: ours.state.global_step >= step)
        with pytest.raises((OutOfBudget, torch.OutOfMemoryError)):
            ours.train()
    return sorted(path.name for path in Path(ours.args.output_dir).glob("checkpoint-*"))


GIVES_UP = [
    gone_in_passes,
    gone_in_clipping,
    gone_in_a_clip_of_somebody_s_own,
    gone_in_the_optimizer,
    gone_in_the_fetch,
]


@pytest.mark.parametrize("gone", GIVES_UP)
def test_a_run_goes_on_from_the_last_completed_step(made, with_dropout, monkeypatch, gone):
    if gone is gone_in_a_clip_of_somebody_s_own:
        monkeypatch.setattr(Trainer, "_clip_grad_norm", lambda *_: None)
    expected = made(Trainer, with_dropout, **GIVEN)
    expected.train()
    assert given_up(made, with_dropout, monkeypatch, gone, 5) == ["checkpoint-5"]
    again = made(AutoFitTrainer, with_dropout, **GIVEN, **SAVES)
    again.train(resume_from_checkpoint=True)
    assert same(weights(again), weights(expected))
    for figure in ("num_input_tokens_seen", "total_flos"):
        assert getattr(again.state, figure) == getattr(expected.state, figure)


@pytest.mark.parametrize("gone", [gone_half_way_in_the_optimizer, gone_after_the_optimizer])
def test_weights_that_may_have_moved_are_not_saved(made, with_dropout, monkeypatch, gone):
    assert given_up(made, with_dropout, monkeypatch, gone, 5) == []


@pytest.mark.parametrize("gone", GIVES_UP)
@pytest.mark.parametrize(("step", "strategy"), [(0, "steps"), (8, "steps"), (5, "no")])
def test_none_is_saved_where_none_is_wanted_or_none_would_go_on(made, tiny_llama, monkeypatch, gone, step, strategy):
    assert given_up(made, tiny_llama, monkeypatch, gone, step, save_strategy=strategy) == []


def test_a_save_besides_checkpoints_is_done_again(made, monkeypatch, tmp_path):
    ours = made(AutoFitTrainer, max_steps=1)
    ours.train()
    genuine, fails = PreTrainedModel.save_pretrained, [True, False, True, True, True]

    def save(self, *args, **kwargs):
        return out_of_memory() if fails.pop(0) else genuine(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    ours.save_model(str(tmp_path / "end"))
    assert same(type(ours.model).from_pretrained(tmp_path / "end").state_dict(), weights(ours))
    with pytest.raises(OutOfBudget, match="save does not fit, tried 3 times"):
        ours.save_model(str(tmp_path / "never"))
    assert [event["phase"] for event in ours.recovery.events] == ["save"] * 4
