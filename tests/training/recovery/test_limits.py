"""Under limits of bytes training goes on as undisturbed, in smaller pieces where it must, or says that it cannot."""

import json
import os
import shutil

import pytest
import torch
from transformers import Trainer

from autofit.errors import OutOfBudget, UsageError
from autofit.memory.ledger import Ledger
from autofit.training.recovery import faults, redoing
from autofit.training.recovery.trainers import AutoFitTrainer
from autofit.trial.record import requested_bytes
from tests.training.recovery.conftest import (
    FailingAllocations,
    examples,
    farthest,
    pad,
    same,
)
from tests.training.recovery.test_training import MAY_BE_RAISED, losses, trained, where

# Where a batch is made, which is raised, for a loader cannot go on; a run can.
FETCH = "transformers.trainer_utils.RemoveColumnsCollator.__call__"


def limited(trainer, bytes_=None):
    """A ledger that holds the model and has room for so many bytes more."""
    ledger = Ledger()
    ledger.hold([*trainer.model.parameters(), *trainer.model.buffers()])
    if bytes_ is not None:
        ledger.limit_bytes = ledger.live_bytes + bytes_
    return ledger


def peak_bytes(trainer):
    """What a training takes besides the model."""
    ledger = limited(trainer)
    held = ledger.live_bytes
    trained(trainer, ledger)
    return ledger.peak_bytes - held


def test_under_any_limit_it_trains_as_undisturbed_or_says_that_it_cannot(made):
    """It trains wherever every sequence alone fits."""
    stock = made(Trainer)
    start, expected = trained(stock)
    whole, single = made(AutoFitTrainer), made(AutoFitTrainer)
    single._plan(1, redoing.Thrift.NONE)
    room, enough = peak_bytes(whole), peak_bytes(single)
    assert enough < 0.6 * room
    outcomes, raised = [], {}
    for percent in (*range(10), *range(10, 101, 3)):
        ours, bytes_ = made(AutoFitTrainer), room * percent // 100
        try:
            _, found = trained(ours, limited(ours, bytes_))
        except OutOfBudget:
            assert bytes_ < enough, f"{percent} %"
            outcomes.append("out of budget")
            continue
        except torch.OutOfMemoryError as error:
            raised[bytes_] = (where(error), requested_bytes(str(error)))
            continue
        outcomes.append("trained")
        assert farthest(expected, found, start) < 1e-6, f"{percent} %"
        assert [entry[2] for entry in losses(ours)] == [entry[2] for entry in losses(stock)]
        assert [entry[0] for entry in losses(ours)] == pytest.approx([entry[0] for entry in losses(stock)], abs=1e-4)
        assert [e["event"] for e in ours.recovery.events].count("oom") > 0 or percent > 95
    assert outcomes.count("trained") > 15
    assert outcomes.count("out of budget") > 15
    # With next to no room, on the host, which is the device here.
    assert all(place in {*MAY_BE_RAISED, FETCH} and size < 1024 for place, size in raised.values())
    assert max(raised, default=0) < room / 50


def test_a_long_example_last_in_the_epoch_is_all_that_is_cut(made):
    """Under a limit that all other steps keep to: the same steps, in the same order, and the same weights."""
    given = {"max_steps": 4, "per_device_train_batch_size": 2}  # an epoch
    order = []

    def noting(rows):
        order.extend(row["input_ids"][0] for row in rows)
        return pad(rows)

    short = [{"input_ids": [number + 1, *row["input_ids"][:11]]} for number, row in enumerate(examples())]
    peak = peak_bytes(made(AutoFitTrainer, train_dataset=short, data_collator=noting, **given))
    undisturbed, last = list(order), order[-1]
    data = list(short)
    data[last - 1] = {"input_ids": [last, *(examples()[1]["input_ids"] * 2)[:59]]}
    stock = made(Trainer, train_dataset=data, **given)
    start, expected = trained(stock)
    order.clear()
    ours = made(AutoFitTrainer, train_dataset=data, data_collator=noting, **given)
    _, found = trained(ours, limited(ours, int(1.5 * peak)))
    assert order == undisturbed
    assert ours.state.global_step == 4
    assert ours.state.epoch == stock.state.epoch
    assert farthest(expected, found, start) < 1e-6
    assert [entry[2] for entry in losses(ours)] == [entry[2] for entry in losses(stock)]
    ooms = [event for event in ours.recovery.events if event["event"] == "oom"]
    assert {event["step"] for event in ooms} == {3}
    assert any("cut into pieces" in event["did"] for event in ooms)


def test_a_cut_grows_back(made, monkeypatch):
    """Down and up again, the weights are those of the undisturbed run."""
    start, expected = trained(made(Trainer, max_steps=8))
    monkeypatch.setattr(redoing, "QUIET_STEPS", 2)
    ours = made(AutoFitTrainer, max_steps=8)
    counter = FailingAllocations()
    trained(made(AutoFitTrainer, max_steps=1), counter)
    middle = counter.count // 2
    _, found = trained(ours, FailingAllocations({middle, middle + 60}))
    assert farthest(expected, found, start) < 1e-6
    kinds = [event["event"] for event in ours.recovery.events]
    assert kinds.count("oom") == 2
    assert kinds[-1] == "grow"
    assert ours.recovery.events[-1]["most_tokens"] is None


def test_an_allocator_that_strains_makes_the_next_steps_smaller(made, monkeypatch):
    counts = iter([0, 1, 1, 2, 3, 3, 3])  # once is nothing; twice in a row is
    monkeypatch.setattr(faults, "allocator_retries", lambda: next(counts))
    start, expected = trained(made(Trainer, max_steps=7))
    ours = made(AutoFitTrainer, max_steps=7)
    _, found = trained(ours)
    eased = [event for event in ours.recovery.events if event["event"] == "strain"]
    assert [event["step"] for event in eased] == [4]
    assert farthest(expected, found, start) < 1e-5


def test_gpu_mem_holds_the_process_to_a_budget(made):
    start, expected = trained(made(Trainer))
    ledger = Ledger()
    whole = made(AutoFitTrainer)
    ledger.hold([*whole.model.parameters(), *whole.model.buffers()])
    held = ledger.live_bytes
    trained(whole, ledger)
    budget = f"{held + (ledger.peak_bytes - held) * 6 // 10}B"
    ours = made(AutoFitTrainer, gpu_mem=budget)
    _, found = trained(ours)
    assert farthest(expected, found, start) < 1e-5
    assert any(event["event"] == "oom" for event in ours.recovery.events)
    with pytest.raises(UsageError, match=r"the model's weights alone take .* load it with quantization_config"):
        made(AutoFitTrainer, gpu_mem="1000B")
    with pytest.raises(UsageError, match="neither a size"):
        made(AutoFitTrainer, gpu_mem="plenty")


@pytest.mark.soak
def test_whole_runs_out_of_memory_at_each_allocation(run, tmp_path):
    """Of seven steps with saves and evaluations; where it is raised, the run goes on from its checkpoint."""
    given = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": examples()[:6], "save_total_limit": None}
    expected, counted, raised = run.undisturbed(**given), tmp_path / "count", 0

    def count(ours):
        counter = FailingAllocations()
        train = ours.train

        def counting(**kwargs):
            with counter:
                train(**kwargs)
            counted.write_text(str(counter.count))

        ours.train = counting

    assert run(tmp_path / "whole", count, **given) == 0
    figures = logged(tmp_path / "whole")
    assert len(evaluated(figures)) == 4
    for number in range(int(counted.read_text())):
        folder = tmp_path / str(number)

        def spoil(ours, number=number):
            train = ours.train

            def failing(**kwargs):
                try:
                    with FailingAllocations({number}):
                        train(**kwargs)
                except torch.OutOfMemoryError as error:
                    os._exit(7 if where(error) in {*MAY_BE_RAISED, FETCH} else 8)

            ours.train = failing

        ended = run(folder, spoil, **given)
        assert ended in (0, 7), number
        raised += ended == 7
        assert ended == 0 or run(folder, **given) == 0
        assert same(torch.load(folder / "end"), expected), number
        if ended == 0:
            found = logged(folder)
            assert [line for line in found if "loss" in line] == [line for line in figures if "loss" in line], number
            # An evaluation in parts is put together.
            assert evaluated(found) == pytest.approx(evaluated(figures), rel=1e-6), number
        shutil.rmtree(folder, ignore_errors=True)
    assert number > 1000
    assert raised < number / 20


def logged(folder):
    """Losses and norms of a finished run."""
    history = json.loads((folder / "checkpoint-7" / "trainer_state.json").read_text())["log_history"]
    names = ("loss", "eval_loss", "grad_norm", "step")
    return [{name: line[name] for name in names if name in line} for line in history]


def evaluated(history):
    return [line["eval_loss"] for line in history if "eval_loss" in line]
