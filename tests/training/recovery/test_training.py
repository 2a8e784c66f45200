"""An out-of-memory in the middle of training changes nothing in the result."""

import json
import traceback

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback

from autofit.errors import OutOfBudget, UsageError
from autofit.memory.ledger import Ledger
from autofit.training.recovery.faults import Record, Watch
from autofit.training.recovery.trainers import AutoFitTrainer
from autofit.trial.record import requested_bytes
from tests.training.recovery.conftest import FailingAllocations, farthest, pad, same, weights


def losses(trainer):
    return [
        (line["loss"], line["grad_norm"], line["learning_rate"]) for line in trainer.state.log_history if "loss" in line
    ]


def trained(trainer, *modes):
    start = weights(trainer)
    for mode in modes:
        mode.__enter__()
    try:
        trainer.train()
    finally:
        for mode in reversed(modes):
            mode.__exit__(None, None, None)
    return start, weights(trainer)


@pytest.mark.parametrize(
    "given", [{}, {"gradient_accumulation_steps": 1}, {"label_smoothing_factor": 0.1}, {"max_steps": 5}]
)
def test_undisturbed_it_is_the_stock_class_bit_for_bit(made, given):
    stock, ours = made(Trainer, **given), made(AutoFitTrainer, **given)
    assert same(trained(stock)[1], trained(ours)[1])
    assert losses(stock) == losses(ours)
    assert ours.recovery.events == []


# Where the stock loop takes less than 1 KiB and an out-of-memory is raised, for it could not be done again there.
MAY_BE_RAISED = {
    "torch.utils.data.dataloader._BaseDataLoaderIter.__init__",  # on the host: the seed of an epoch's loader
    "torch.utils.data.sampler.RandomSampler.__iter__",  # on the host: the seed of an epoch's order
    "transformers.trainer.Trainer._run_epoch",  # whether a loss is finite: one byte
    "transformers.trainer.Trainer._maybe_log_save_evaluate",  # the mean of the losses that are logged: four bytes
}


def where(error):
    """The stock function in which it came up."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname}" for frame in frames]
    inner = ("torch._compile", "torch._dynamo", "tests.", "autofit.memory.")
    return next(name for name in reversed(names) if not name.startswith(inner))


def test_a_fault_at_any_allocation_of_a_step_changes_nothing(made, with_dropout):
    """Of a model with dropout: the same random numbers are drawn again, and none is left out."""
    counter = FailingAllocations(least=1)
    stock = made(Trainer, with_dropout, max_steps=1)
    _, expected = trained(stock)
    assert not same(expected, trained(made(Trainer, max_steps=1))[1])
    trained(made(AutoFitTrainer, with_dropout, max_steps=1), counter)
    raised = {}
    for number in range(counter.count):
        ours = made(AutoFitTrainer, with_dropout, max_steps=1)
        try:
            _, found = trained(ours, FailingAllocations({number}, least=1))
        except torch.OutOfMemoryError as error:
            raised.setdefault(where(error), []).append(requested_bytes(str(error)))
            continue
        assert same(found, expected), f"allocation {number}"
        assert losses(ours) == losses(stock)
        assert len(ours.recovery.events) == 1
    assert counter.count > 400
    assert raised.keys() <= MAY_BE_RAISED
    assert max(map(max, raised.values())) < 1024


@pytest.mark.parametrize("number", range(4))
def test_an_out_of_memory_in_the_fetch_is_raised_and_ends_no_epoch_early(made, tmp_path, number):
    """A loader that has failed cannot go on; a checkpoint can."""
    given = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path)}
    _, expected = trained(made(Trainer, **given))
    count = iter(range(100))

    def collate(rows):
        if next(count) == number:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return pad(rows)

    folder = tmp_path / "ours"
    ours = made(AutoFitTrainer, **{**given, "output_dir": str(folder)}, data_collator=collate)
    with pytest.raises(torch.OutOfMemoryError):
        ours.train()
    done = max(0, number - 1) // 2  # accelerate's loader is one batch ahead
    assert ours.state.global_step == done
    again = made(AutoFitTrainer, **{**given, "output_dir": str(folder)})
    again.train(resume_from_checkpoint=True if done else None)
    assert same(weights(again), expected)


def mean_over_rows(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].float()
    token = cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return (token.sum(1) / (labels[:, 1:] != -100).sum(1)).mean() / 2


def mean_over_tokens(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()) / 2


def contrastive(outputs, labels, num_items_in_batch=None):
    states = outputs.logits.float().mean(1)
    return (states @ states.T).logsumexp(1).mean()


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (None, "sum"),
        (mean_over_rows, "mean over rows"),
        (mean_over_tokens, "mean over trained tokens"),
        (contrastive, "of all rows together"),
    ],
)
def test_a_loss_is_cut_as_what_it_is(made, loss, kind):
    given = {} if loss is None else {"compute_loss_func": loss}
    start, expected = trained(made(Trainer, **given))
    counter = FailingAllocations()
    trained(made(AutoFitTrainer, max_steps=1, **given), counter)
    ours = made(AutoFitTrainer, **given)
    first = counter.count // 3
    faults = FailingAllocations({first, first + counter.count // 4})
    if kind == "of all rows together":
        with pytest.raises((OutOfBudget, torch.OutOfMemoryError)) as caught:
            trained(ours, FailingAllocations(range(first, 100_000)))
        assert "cannot be cut" in str(caught.value)
        return
    _, found = trained(ours, faults)
    assert [event.get("kind") for event in ours.recovery.events if event["event"] == "loss"] == [kind]
    assert farthest(expected, found, start) < 1e-5


def test_padding_free_batches_are_cut_between_sequences(made):
    given = {"data_collator": DataCollatorWithFlattening()}
    start, expected = trained(made(Trainer, **given))
    counter = FailingAllocations()
    trained(made(AutoFitTrainer, max_steps=1, **given), counter)
    ours = made(AutoFitTrainer, **given)
    first = counter.count // 3
    _, found = trained(ours, FailingAllocations({first, first + counter.count // 4}))
    assert any("cut into pieces" in event.get("did", "") for event in ours.recovery.events)
    assert farthest(expected, found, start) < 1e-5


def test_a_trainer_can_train_again(made):
    ours, stock = made(AutoFitTrainer), made(Trainer)
    for trainer in (ours, stock):
        trainer.train()
        trainer.train()
    assert same(weights(ours), weights(stock))


def test_events_are_kept_in_the_run_s_folder(made, tmp_path):
    counter = FailingAllocations()
    trained(made(AutoFitTrainer, max_steps=1), counter)
    ours = made(AutoFitTrainer, output_dir=str(tmp_path / "run"))
    trained(ours, FailingAllocations({counter.count // 2}))
    (line,) = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert event == ours.recovery.events[0]
    assert event["phase"] == "forward"
    assert event["seconds"] > 0
    assert event["held_bytes"]["weights"] == sum(p.nbytes for p in ours.model.parameters()) + sum(
        buffer.nbytes for buffer in ours.model.buffers()
    )
    assert event["held_bytes"]["gradients"] >= 0
    summary = ours.recovery.summary()
    assert summary[0] == "out of memory 1 times: 1 in forward"
    assert summary[1].startswith("the last time: freed memory and tried the same again; ")
    assert summary[2] == f"all of it: {tmp_path / 'run' / 'events.jsonl'}"


def test_what_an_allocation_asked_for_is_on_record():
    record = Record(None)
    with Watch() as watch:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 896.00 MiB. GPU 0 has …")
    record.oom(watch, "step", "cut finer")
    assert record.events[0]["requested_bytes"] == 896 * 2**20
    assert record.events[0]["did"] == "cut finer"
    assert Record(None).summary() == []


def test_memory_is_flat_over_many_recoveries(made):
    counter = FailingAllocations()
    trained(made(AutoFitTrainer, max_steps=1), counter)
    ours = made(AutoFitTrainer, max_steps=230, logging_steps=1000)
    ledger, live = Ledger(), []
    ours.add_callback(_AtStepEnd(lambda: live.append(ledger.live_bytes)))
    trained(ours, ledger, FailingAllocations(range(counter.count // 2, 230 * counter.count, counter.count)))
    assert sum(event["event"] == "oom" for event in ours.recovery.events) >= 200
    assert max(live[10:]) <= max(live[:10])


class _AtStepEnd(TrainerCallback):
    def __init__(self, work):
        self.work = work

    def on_step_end(self, *args, **kwargs):
        self.work()


def test_checkpoints_are_the_stock_class_s_and_a_resumed_run_goes_on_as_it_would_have(made):
    _, expected = trained(made(Trainer, max_steps=4))
    counter = FailingAllocations()
    trained(made(AutoFitTrainer, max_steps=1), counter)
    given = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first = made(AutoFitTrainer, **given)
    first.add_callback(_StopAfter(2))
    trained(first, FailingAllocations({counter.count // 2}))
    for cls in (AutoFitTrainer, Trainer):
        again = made(cls, **given)
        again.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-2")
        assert same(weights(again), expected)


class _StopAfter(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


class Copies:
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.calls = getattr(self, "calls", 0) + 1
        return super().training_step(model, inputs if self.calls % 2 else {**inputs}, num_items_in_batch)


class CopiesAll:
    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, {**inputs}, num_items_in_batch)


class Skips:
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls % 2 == 0:
            return torch.zeros(())
        return super().training_step(model, inputs, num_items_in_batch)


class Twice:
    def training_step(self, model, inputs, num_items_in_batch=None):
        super().training_step(model, inputs, num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.mark.parametrize("own", [Copies, Skips, Twice])
def test_a_step_of_one_s_own_loses_no_micro_batch_silently(made, own):
    ours, stock = type("Ours", (own, AutoFitTrainer), {}), type("Stock", (own, Trainer), {})
    with pytest.raises(UsageError, match="a training_step of your own"):
        made(ours).train()
    if own is Twice:  # alone it is as the stock class has it
        trainers = [made(cls, gradient_accumulation_steps=1) for cls in (ours, stock)]
        for trainer in trainers:
            trainer.train()
        assert same(*map(weights, trainers))


def test_a_step_of_one_s_own_that_makes_other_inputs_is_done_again_where_it_is_whole(made, caplog):
    ours, stock = type("Ours", (CopiesAll, AutoFitTrainer), {}), type("Stock", (CopiesAll, Trainer), {})
    undisturbed = made(stock, gradient_accumulation_steps=1)
    undisturbed.train()
    counter = FailingAllocations()
    trained(made(ours, gradient_accumulation_steps=1), counter)
    again = made(ours, gradient_accumulation_steps=1)
    trained(again, FailingAllocations({counter.count // 3}))
    assert same(weights(again), weights(undisturbed))
    assert len(again.recovery.events) == 1
    # Of one among several it is not known what became of the others.
    with pytest.raises(torch.OutOfMemoryError), caplog.at_level("WARNING"):
        trained(made(ours), FailingAllocations({counter.count // 3}))
    assert "is not done again; do that in compute_loss" in caplog.text
