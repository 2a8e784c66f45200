"""What a script makes itself, in the place of what the stock class would make."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from autofit.errors import OutOfBudget
from autofit.training.recovery.trainers import AutoFitTrainer
from tests.training.recovery.conftest import FailingAllocations, examples, farthest, pad, same, weights
from tests.training.recovery.test_training import losses, trained


def owning(own, cls):
    return cls if own is object else type(cls.__name__, (own, cls), {})


def undisturbed(own, made, **given):
    return trained(made(owning(own, Trainer), **given))[1]


class OwnOptimizer:
    """Makes it without asking the stock class, as for rates of their own for some layers."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, foreach=False)
        return self.optimizer


class _InTheOptimizer(TrainerCallback):
    """So many allocations fail in the middle of the second step's optimizer, one after the other."""

    def __init__(self, mode, times):
        self.mode, self.times = mode, times

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.mode.fail = set(range(self.mode.count + 9, self.mode.count + 9 + self.times))


@pytest.mark.parametrize("times", [1, 1000])
def test_the_step_of_an_optimizer_of_one_s_own_happens_or_does_not(made, times):
    """And a checkpoint of the step before has the weights of the step before."""
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 3}
    saves = {"save_strategy": "steps", "save_steps": 100}
    mode, ours = FailingAllocations(), made(owning(OwnOptimizer, AutoFitTrainer), **given, **saves)
    ours.add_callback(_InTheOptimizer(mode, times))
    expected = undisturbed(OwnOptimizer, made, **given)
    if times == 1:
        trained(ours, mode)
    else:
        with pytest.raises(OutOfBudget):
            trained(ours, mode)
        assert [path.name for path in Path(ours.args.output_dir).glob("checkpoint-*")] == ["checkpoint-1"]
        ours = made(owning(OwnOptimizer, AutoFitTrainer), **given, **saves)
        ours.train(resume_from_checkpoint=True)
    assert same(weights(ours), expected)


def test_a_clip_that_a_script_has_put_in_its_place_stays(made):
    def halves(parameters, max_norm, norm_type=2):
        return nn.utils.clip_grad_norm_(list(parameters), max_norm / 2, norm_type)

    trainers = [made(cls) for cls in (Trainer, AutoFitTrainer)]
    for trainer in trainers:
        trainer.accelerator.clip_grad_norm_ = halves
        trainer.train()
        assert trainer.accelerator.clip_grad_norm_ is halves
    assert same(*map(weights, trainers))


class Pairs:
    """Batches without names."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, labels = inputs
        outputs = model(input_ids=ids, labels=labels)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OfBatches:
    """How a step comes out that ran out of memory twice, with batches of some collator."""

    def __init__(self, made, **given):
        self.made, self.given = made, given

    def off(self, own, at=0.3):
        start, expected = trained(self.made(owning(own, Trainer), **self.given))
        counter, ours = FailingAllocations(), self.made(owning(own, AutoFitTrainer), **self.given)
        assert same(trained(ours, counter)[1], expected)
        number, self.ours = int(counter.count * at), self.made(owning(own, AutoFitTrainer), **self.given)
        return farthest(expected, trained(self.ours, FailingAllocations({number, number + 1}))[1], start)

    @property
    def kinds(self):
        return [event["kind"] for event in self.ours.recovery.events if event["event"] == "loss"]


def test_batches_without_names_are_done_again(made):
    def pair(rows):
        batch = pad(rows)
        return batch["input_ids"], batch["labels"]

    assert OfBatches(made, data_collator=pair).off(Pairs) == 0


def test_labels_on_padding_count_in_smaller_pieces(made):
    """As those of scripts that take the ids for labels; all rows being equally long hides it from measuring."""

    def naive(rows):
        ids = torch.tensor([row["input_ids"][:5] + [0] * 43 for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.clone()}

    batches = OfBatches(made, data_collator=naive)
    assert batches.off(object) < 1e-5
    assert batches.kinds == ["sum"]


class AddsGradients:
    """A penalty's gradient, in a pass of its own after each micro-batch."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.accelerator.backward(0.01 * sum((p**2).sum() for p in model.parameters()))
        return loss


class Loss(nn.Module):
    """With a weight that is trained, and a mean that it keeps."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(64))
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, logits, labels):
        self.mean.mul_(0.9).add_(logits.detach().mean((0, 1)), alpha=0.1)
        logits = logits + self.scale + self.mean
        return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum")


class HasALoss:
    """Which is no part of the model."""

    def create_optimizer(self, model=None):
        self.loss, self.calls = Loss(), 0
        optimizer = super().create_optimizer()
        optimizer.add_param_group({"params": self.loss.parameters(), "lr": 1e-2})
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls += 1
        return self.loss(model(**inputs).logits, inputs["labels"]) * (1 + 0.1 * self.calls) / num_items_in_batch


@pytest.mark.parametrize("own", [AddsGradients, HasALoss])
def test_what_a_script_has_besides_the_model_is_as_before_a_failed_attempt(made, own):
    expected, counter = undisturbed(own, made), FailingAllocations()
    assert same(trained(made(owning(own, AutoFitTrainer)), counter)[1], expected)
    for share in (0.2, 0.3, 0.4, 0.7, 0.8):
        ours = made(owning(own, AutoFitTrainer))
        assert same(trained(ours, FailingAllocations({int(share * counter.count)}))[1], expected)
        assert len(ours.recovery.events) == 1


def tags(rows):
    """Labels of another name, of rows that differ in how many they have."""
    batch = pad(rows)
    batch["tags"] = batch.pop("labels")
    return batch


def classes(rows):
    batch = pad(rows)
    return {**batch, "labels": torch.tensor([int(row["input_ids"][0] % 5 == 0) for row in rows])}


class MeanOverTags:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tags = inputs.pop("tags")
        logits = model(**inputs).logits[:, :-1].transpose(1, 2)
        return nn.functional.cross_entropy(logits, tags[:, 1:])


class WeightedClasses:
    """The mean is one of the classes' weights."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0, :2]
        return nn.functional.cross_entropy(logits, inputs["labels"], weight=torch.tensor([1.0, 9.0]))


class Contrasts:
    """A term of those of one class, which two rows alone don't have."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]
        itself = torch.eye(len(found), dtype=torch.bool)
        near = (found @ found.T).masked_fill(itself, -1e9).log_softmax(1)
        alike = (inputs["labels"][:, None] == inputs["labels"]) & ~itself
        apart = -(near * alike).sum(1) / alike.sum(1).clamp(min=1)
        return nn.functional.cross_entropy(found[:, :2], inputs["labels"]) + apart.mean()


@pytest.mark.parametrize(("own", "collator"), [(MeanOverTags, tags), (WeightedClasses, classes), (Contrasts, classes)])
def test_what_is_no_mean_over_rows_is_not_taken_for_one(made, own, collator):
    """Though the first batch has rows of equal lengths and one class: two of those cannot tell."""
    rows = sorted(examples(), key=lambda row: row["input_ids"][0] % 5 == 0)
    rows = [{"input_ids": (row["input_ids"] * 6)[: 12 if i < 2 else 14 + i]} for i, row in enumerate(rows)]

    class Sorted(own):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    given = {"label_names": ["tags"]} if own is MeanOverTags else {}
    batches = OfBatches(made, data_collator=collator, train_dataset=rows, **given)
    assert batches.off(Sorted, at=0.1) == 0
    assert batches.kinds == ["of all rows together"]


class StaysNear:
    """A penalty that is zero as long as the weights are the first ones."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not hasattr(self, "first"):
            self.first = [p.detach().clone() for p in model.parameters()]
        away = sum(((p - q) ** 2).sum() for p, q in zip(model.parameters(), self.first, strict=True))
        return model(**inputs, num_items_in_batch=num_items_in_batch).loss + 0.5 * away


def test_a_term_that_comes_later_is_noticed(made):
    batches = OfBatches(made, max_steps=8)
    assert batches.off(StaysNear, at=0.03) < 1e-5
    assert batches.kinds == ["sum", "of all rows together"]


class _Ends(TrainerCallback):
    """Ends an epoch or all of it before or after a micro-batch of the second step, once."""

    def __init__(self, event, flag):
        self.flag = flag
        setattr(self, event, self.end)

    def end(self, args, state, control, **kwargs):
        if self.flag and state.global_step == 1:
            setattr(control, self.flag, True)
            self.flag = None


@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end"])
@pytest.mark.parametrize("flag", ["should_training_stop", "should_epoch_stop"])
def test_a_callback_may_end_it_in_the_midst_of_a_step(made, event, flag):
    """The stock loop keeps the gradients that there are by then, and adds the next epoch's to them."""
    ends, counter = [], FailingAllocations()
    for cls, *modes in ((Trainer,), (AutoFitTrainer, counter), (AutoFitTrainer, None)):
        trainer = made(cls, max_steps=4)
        trainer.add_callback(_Ends(event, flag))
        modes = [mode or FailingAllocations({counter.count - 60}) for mode in modes]
        ends.append((trained(trainer, *modes)[1], losses(trainer), trainer.state.global_step))
    assert len(trainer.recovery.events) == 1
    for found, figures, steps in ends[1:]:
        assert same(found, ends[0][0])
        assert (figures, steps) == ends[0][1:]


class Movable:
    """No tensor, and yet a loader moves it."""

    def __init__(self):
        self.moved = 0

    def to(self, device):
        self.moved += 1
        return self


class Looks:
    """A step that looks at its inputs before the stock one moves them."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen = [*getattr(self, "seen", []), inputs["more"].moved]
        return super().training_step(model, inputs, num_items_in_batch)


class TakesMore:
    def compute_loss(self, model, inputs, *args, **kwargs):
        assert inputs.pop("more").moved
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("own", [(TakesMore,), (Looks, TakesMore)])
def test_whatever_the_stock_loader_moves_is_moved(made, own, caplog):
    def collate(rows):
        return pad(rows) | {"more": Movable()}

    trainers = [
        made(type("Mine", (*own, cls), {}), data_collator=collate, remove_unused_columns=False)
        for cls in (Trainer, AutoFitTrainer)
    ]
    for trainer in trainers:
        trainer.train()
    assert same(*map(weights, trainers))
    if Looks in own:
        assert min(trainers[1].seen) > 0
        assert "gets zero for all micro-batches of a step but the last" in caplog.text
