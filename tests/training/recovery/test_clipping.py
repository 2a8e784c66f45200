"""Clipping happens or does not, whatever runs out of memory in it; under fp16's loss scaling too."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import Trainer

from autofit.errors import OutOfBudget
from autofit.training.recovery.clipping import _in_parts
from autofit.training.recovery.faults import Record
from autofit.training.recovery.trainers import AutoFitTrainer
from tests.training.recovery.conftest import FailingAllocations, same, weights

SCALE = 2.0**10


@pytest.fixture
def scaled(monkeypatch):
    """Puts a trainer under fp16's loss scaling, with a real scaler; accelerate has none on the CPU."""

    def scale(trainer):
        accelerator = trainer.accelerator
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=SCALE)
        return trainer

    return scale


class Clipping(AutoFitTrainer):
    """Says which allocations are those of clipping."""

    def _whole(self, clip):
        begun = self.mode.count
        norm = super()._whole(clip)
        self.clips.append(range(begun, self.mode.count))
        return norm


def trained(trainer, mode=None):
    trainer.mode, trainer.clips = mode or FailingAllocations(), []  # only `Clipping` looks at them
    with trainer.mode:
        trainer.train()
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    return weights(trainer), norms


@pytest.mark.parametrize("loss_scaling", [False, True], ids=["plain", "fp16"])
@pytest.mark.parametrize("most", [0.1, 0.0])
def test_clipping_that_ran_out_of_memory_clips_once(made, scaled, most, loss_scaling):
    """At each of its allocations; with 0 the norm is taken all the same, and fp16's scale out of the gradients."""
    given = {"max_grad_norm": most}
    prepared = scaled if loss_scaling else lambda trainer: trainer
    stock = prepared(made(Trainer, **given))
    expected, norms = trained(stock)
    assert norms == pytest.approx([0.74, 0.72], abs=0.02)
    if loss_scaling:
        assert stock.accelerator.scaler._get_growth_tracker() == 2  # steps that were taken, and not skipped
    undisturbed = prepared(made(Clipping, **given))
    assert same(trained(undisturbed, FailingAllocations(least=1))[0], expected)
    numbers = [number for clip in undisturbed.clips for number in clip]
    assert len(numbers) > (45 if loss_scaling else 30)
    for number in numbers[:: 1 if most else 3]:
        ours = prepared(made(Clipping, **given))
        found, logged = trained(ours, FailingAllocations({number}, least=1))
        assert same(found, expected), number
        assert logged == norms
        assert [event["phase"] for event in ours.recovery.events] == ["clipping"]


def two_kinds():
    """Parameters with gradients of two types."""
    draw = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(40, 8, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16) * 2]
    for parameter in parameters:
        parameter.grad = torch.randn(40, 8, generator=draw).to(parameter.dtype)
    return parameters


def clipped(parameters, fail=(), scaler=None):
    accelerator, record = Accelerator(cpu=True), Record(None)
    if scaler is not None:
        accelerator._optimizers = [torch.optim.SGD(parameters)]
        accelerator.scaler, accelerator.native_amp = scaler, True
    with FailingAllocations(fail, least=1) as mode, _in_parts(accelerator, record):
        norm = accelerator.clip_grad_norm_(parameters, 1.0)
    assert "clip_grad_norm_" not in vars(accelerator)
    return norm, mode.count, record


def test_gradients_of_several_types_are_clipped_once_each():
    expected = two_kinds()
    norm = nn.utils.clip_grad_norm_(expected, 1.0)
    count = clipped(two_kinds())[1]
    assert count >= 10
    for number in range(count):
        parameters = two_kinds()
        found, _, record = clipped(parameters, {number})
        assert found == norm
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(parameters, expected, strict=True)), number
        assert [event["phase"] for event in record.events] == ["clipping"]


def test_where_nobody_knows_what_was_unscaled_it_is_not_done_again(scaled, monkeypatch):
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")

    def scaler():
        made = torch.amp.GradScaler("cpu", init_scale=SCALE)
        made.scale(torch.ones(()))
        return made

    expected = two_kinds()
    for parameter in expected:
        parameter.grad /= SCALE
    nn.utils.clip_grad_norm_(expected, 1.0)
    parameters = two_kinds()
    clipped(parameters, scaler=scaler())
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(parameters, expected, strict=True))
    with pytest.raises(OutOfBudget, match="again it might divide twice"):
        clipped(two_kinds(), {2}, scaler())


def test_a_clip_of_somebody_s_own_is_not_repeated(made, monkeypatch):
    def clip(self, model):
        next(p for p in model.parameters() if p.grad is not None).grad.mul_(0.5)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Trainer, "_clip_grad_norm", clip)
    with pytest.raises(OutOfBudget, match="again it might clip twice"):
        made(AutoFitTrainer).train()
