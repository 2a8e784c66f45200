"""What a forward pass changes besides gradients is put back; or, where no copy is kept of it, nothing is done again."""

import contextlib
import copy
import gc
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from autofit.errors import OutOfBudget
from autofit.training.recovery.redoing import Thrift
from autofit.training.recovery.trainers import AutoFitTrainer
from autofit.training.recovery.undo import _LARGEST_BUFFER, Snapshot
from tests.training.recovery.conftest import ARGUMENTS, FailingAllocations, same, weights
from tests.training.recovery.test_scripts import notebook_in_four_bits


class Model(nn.Module):
    """A student, a frozen teacher, and a queue of one buffer; `changes` says what else the forward pass does."""

    def __init__(self, changes, rows=_LARGEST_BUFFER // 32):
        super().__init__()
        torch.manual_seed(0)
        self.student, self.teacher, self.changes = nn.Linear(32, 32), nn.Linear(32, 32), changes
        self.teacher.requires_grad_(False)
        self.register_buffer("queue", torch.zeros(rows, 32))
        self.register_buffer("at", torch.zeros((), dtype=torch.long))

    def forward(self, x=None, labels=None):
        with torch.no_grad():
            self.changes(self, x)
        near = self.teacher(x).tanh() - self.queue[:64].mean(0)
        return {"loss": (self.student(x).tanh() - near).pow(2).sum(1).mean() + self.student(x).relu().mean()}


def nothing(model, x): ...


def queue(model, x):
    at = int(model.at)
    model.queue[at : at + len(x)] = x
    model.at += len(x)


def teacher_anew(model, x):
    for one, other in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
        one.data = one.data * 0.5 + other.data * 0.5


def teacher_in_place(model, x):
    for one, other in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
        one.data.mul_(0.5).add_(other.data, alpha=0.5)  # which counts no version


def weights_themselves(model, x):
    model.student.weight.mul_(0.99)


def trained(cls, folder, changes, fail=(), **given):
    draw = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(32, generator=draw), "labels": number} for number in range(32)]
    callbacks = given.pop("callbacks", None)
    arguments = {**ARGUMENTS, "output_dir": str(folder), "per_device_train_batch_size": 8, **given}
    trainer = cls(model=Model(changes), args=TrainingArguments(**arguments), train_dataset=data, callbacks=callbacks)
    with FailingAllocations(fail) as counter:
        trainer.train()
    return trainer, counter.count


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (nothing, None),
        (queue, "queue"),
        (teacher_anew, "teacher.weight"),
        (teacher_in_place, "teacher.weight"),
        (weights_themselves, "student.weight"),
    ],
)
def test_what_is_not_kept_does_not_change_twice(tmp_path, changes, name):
    """At each allocation of two steps: the weights and buffers of the stock class, or one line with the name."""
    expected = weights(trained(Trainer, tmp_path, changes)[0])
    undisturbed, count = trained(AutoFitTrainer, tmp_path, changes)
    assert same(weights(undisturbed), expected)
    outcomes = Counter()
    for number in range(2, count):  # the first two are of the first batch, on the host
        try:
            ours, _ = trained(AutoFitTrainer, tmp_path, changes, {number})
            outcomes["same" if same(weights(ours), expected) else "different"] += 1
        except OutOfBudget as error:
            outcomes[str(error).partition(":")[0]] += 1
        except torch.OutOfMemoryError:
            pass  # another batch, on the host
    assert outcomes.pop("same") >= 3  # outside the passes
    refused = outcomes.pop(f"{name} changes in the forward pass and is not kept", 0)
    assert (refused > 5) is (name is not None)
    assert not outcomes


def test_what_is_kept_may_change(tmp_path, monkeypatch):
    """A queue that is small is put back."""
    monkeypatch.setattr("autofit.training.recovery.undo._LARGEST_BUFFER", _LARGEST_BUFFER + 1)
    expected = weights(trained(Trainer, tmp_path, queue)[0])
    _, count = trained(AutoFitTrainer, tmp_path, queue)
    seen = 0
    for number in range(6, count):
        with contextlib.suppress(torch.OutOfMemoryError):  # a batch, on the host
            assert same(weights(trained(AutoFitTrainer, tmp_path, queue, {number})[0]), expected)
            seen += 1
    assert seen > 20


def means_anew(model, x):
    model.mean = 0.9 * model.mean + 0.1 * x.mean(0)
    model.queue = torch.cat([x, model.queue])[: len(model.queue)] + model.mean


def counts(model, x):
    model.calls, model.before = getattr(model, "calls", 0) + 1, x * (1 + getattr(model, "before", torch.zeros(()))) / 2
    model.sums.append(float(model.before.sum()))
    model.queue[:64] = model.calls * model.before.mean(0) + sum(model.sums) + torch.randn(32, generator=model.draws)


@pytest.mark.parametrize("changes", [means_anew, counts])
@pytest.mark.parametrize("rows", [64, _LARGEST_BUFFER // 32])
def test_other_values_in_the_place_of_those_before_are_put_back(tmp_path, monkeypatch, changes, rows):
    """Buffers that a forward pass assigns; and what a model of a script's own counts, keeps and draws from."""

    class Own(Model):
        def __init__(self, changes):
            super().__init__(changes, 64 if changes is counts else rows)
            self.register_buffer("mean", torch.zeros(32))
            self.sums, self.draws = [], torch.Generator().manual_seed(5)

    monkeypatch.setitem(trained.__globals__, "Model", Own)
    expected = weights(trained(Trainer, tmp_path, changes)[0])
    undisturbed, count = trained(AutoFitTrainer, tmp_path, changes)
    assert same(weights(undisturbed), expected)
    seen = 0
    for number in range(6, count):
        with contextlib.suppress(torch.OutOfMemoryError):  # a batch, on the host
            assert same(weights(trained(AutoFitTrainer, tmp_path, changes, {number})[0]), expected), number
            seen += 1
    assert seen > 20


class Follows(TrainerCallback):
    """A teacher that follows between steps."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for one, other in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
                one.mul_(0.5).add_(other, alpha=0.5)


def test_what_changes_between_steps_may_change(tmp_path):
    def run(cls, fail=()):
        return trained(cls, tmp_path, nothing, fail, callbacks=[Follows()])

    expected = weights(run(Trainer)[0])
    _, count = run(AutoFitTrainer)
    ours, _ = run(AutoFitTrainer, {count * 2 // 3})
    assert same(weights(ours), expected)
    assert [event["event"] for event in ours.recovery.events] == ["oom"]


def test_a_module_that_came_in_the_midst_is_not_known(tmp_path):
    model = Model(nothing)
    before = Snapshot(None, model)
    model.late = nn.Linear(2, 2)
    with pytest.raises(OutOfBudget, match=r"late\.weight was not there as the step began"):
        before.restore()
    Snapshot(None, model).restore()


def test_a_model_in_four_bits_is_not_said_to_change(tiny_llama, tiny_model, tmp_path):
    """Its weights are laid out anew as the loss is measured, in evaluation mode."""
    ours = notebook_in_four_bits(AutoFitTrainer, tiny_llama, tmp_path, tiny_model)
    ours._plan(60, Thrift.NONE)
    with FailingAllocations() as counter:
        ours.train()
    again = notebook_in_four_bits(AutoFitTrainer, tiny_llama, tmp_path, tiny_model)
    again._plan(60, Thrift.NONE)
    with FailingAllocations({counter.count // 2}):
        again.train()
    assert same(weights(again), weights(ours))
    assert [event["event"] for event in again.recovery.events].count("oom") == 1


def test_a_model_that_was_moved_or_cast_as_a_whole_has_not_changed():
    model = Model(nothing, rows=_LARGEST_BUFFER // 32)
    before = Snapshot(None, model)
    model.to(torch.bfloat16)
    before.restore()
    kept = copy.deepcopy(model.state_dict())
    before = Snapshot(None, model)
    model.teacher.weight.data[0, 0] = torch.nan
    with pytest.raises(OutOfBudget, match=r"teacher\.weight"):
        before.restore()
    Snapshot(None, model).restore()  # NaN is NaN
    assert kept.keys() == model.state_dict().keys()


def test_what_is_known_of_a_model_does_not_keep_it():
    model = Model(nothing)
    Snapshot(None, model).restore()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_what_was_put_elsewhere_before_the_step_is_not_said_to_change():
    """Also where it then has the address that it had before, as memory that was freed comes again."""
    model, memory = Model(nothing), bytearray(32 * 4)
    model.teacher.bias.data = torch.frombuffer(memory, dtype=torch.float32)
    Snapshot(None, model).restore()
    model.teacher.bias.data = torch.frombuffer(memory, dtype=torch.float32)
    Snapshot(None, model).restore()
