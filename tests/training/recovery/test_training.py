"""An out-of-memory in the middle of training changes nothing in the result."""

import pytest
import torch
from transformers import Trainer

from autofit.errors import OutOfBudget
from autofit.memory.ledger import Ledger
from autofit.training.recovery import mixin
from autofit.training.recovery.trainers import AutoFitTrainer
from tests.training.recovery.conftest import FailingAllocations, farthest, same, weights


def losses(trainer):
    return [(line["loss"], line["grad_norm"], line["learning_rate"]) for line in trainer.state.log_history if "loss" in line]


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


@pytest.mark.parametrize("given", [{}, {"gradient_accumulation_steps": 1}, {"label_smoothing_factor": 0.1}, {"max_steps": 5}])
def test_undisturbed_it_is_the_stock_class_bit_for_bit(made, given):
    stock, ours = made(Trainer, **given), made(AutoFitTrainer, **given)
    assert same(trained(stock)[1], trained(ours)[1])
    assert losses(stock) == losses(ours)
    assert ours.recovery.events == []


def test_a_fault_at_any_allocation_of_a_step_changes_nothing(made):
    counter = FailingAllocations()
    stock = made(Trainer, max_steps=1)
    _, expected = trained(stock)
    trained(made(AutoFitTrainer, max_steps=1), counter)
    raised = []
    for number in range(counter.count):
        ours = made(AutoFitTrainer, max_steps=1)
        try:
            _, found = trained(ours, FailingAllocations({number}))
        except torch.OutOfMemoryError:
            raised.append(number)
            continue
        assert same(found, expected), f"allocation {number}"
        assert losses(ours) == losses(stock)
    assert counter.count > 100
    assert len(raised) <= 0.05 * counter.count, raised


def test_under_a_limit_it_trains_on_or_says_that_it_cannot(made):
    stock = made(Trainer)
    start, expected = trained(stock)
    ledger = Ledger()
    whole = made(AutoFitTrainer)
    ledger.hold([*whole.model.parameters(), *whole.model.buffers()])
    held = ledger.live_bytes
    trained(whole, ledger)
    room = ledger.peak_bytes - held
    outcomes = []
    for share in (0.9, 0.7, 0.5, 0.35, 0.2, 0.05):
        ours = made(AutoFitTrainer)
        limited = Ledger(limit_bytes=None)
        limited.hold([*ours.model.parameters(), *ours.model.buffers()])
        limited.limit_bytes = limited.live_bytes + int(share * room)
        try:
            _, found = trained(ours, limited)
        except (OutOfBudget, torch.OutOfMemoryError) as error:
            outcomes.append(type(error).__name__)
            continue
        outcomes.append("trained")
        assert farthest(expected, found, start) < 1e-5
        assert [entry[2] for entry in losses(ours)] == [entry[2] for entry in losses(stock)]
        assert [e["event"] for e in ours.recovery.events].count("oom") > 0
    assert outcomes[:2] == ["trained", "trained"]
    assert outcomes[-1] != "trained"


def test_a_cut_grows_back(made, monkeypatch):
    monkeypatch.setattr(mixin, "QUIET_STEPS", 2)
    ours = made(AutoFitTrainer, max_steps=8)
    counter = FailingAllocations()
    trained(made(AutoFitTrainer, max_steps=1), counter)
    middle = counter.count // 2
    trained(ours, FailingAllocations({middle, middle + 60}))
    kinds = [event["event"] for event in ours.recovery.events]
    assert kinds.count("oom") == 2
    assert kinds[-1] == "grow"
    assert ours.recovery.events[-1]["most_tokens"] is None


def mean_over_rows(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].float()
    token = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return (token.sum(1) / (labels[:, 1:] != -100).sum(1)).mean() / 2


def mean_over_tokens(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()) / 2


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


def test_events_are_kept_in_the_run_s_folder(made, tmp_path):
    counter = FailingAllocations()
    trained(made(AutoFitTrainer, max_steps=1), counter)
    ours = made(AutoFitTrainer, output_dir=str(tmp_path / "run"))
    trained(ours, FailingAllocations({counter.count // 2}))
    assert (tmp_path / "run" / "events.jsonl").read_text().count("\n") == len(ours.recovery.events) == 1
