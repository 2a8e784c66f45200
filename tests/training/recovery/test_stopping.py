"""A signal ends training in time, with a checkpoint; two end it at once, with those that there were."""

import json
import os
import signal
import threading
import time

import pytest
import torch
from transformers import Trainer, TrainerCallback

from autofit.training import checkpoints
from autofit.training.recovery.stopping import Stopped
from autofit.training.recovery.trainers import AutoFitTrainer
from tests.training.recovery.conftest import examples, same, weights
from tests.training.recovery.forked import forked

RUN = {"max_steps": 6, "per_device_train_batch_size": 2, "save_strategy": "no"}  # epochs of four steps


class Signals(TrainerCallback):
    """Sends signals to its own process as a step begins."""

    def __init__(self, *numbers, step=2):
        self.numbers, self.step = numbers, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.fixture
def trains(made, tmp_path):
    """Trains in a fork, with callbacks; returns how that ended."""

    def train(*callbacks, resume=None, before=None, cls=AutoFitTrainer, model=None, **given):
        def work():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if before is not None:
                before()
            ours = made(cls, model, output_dir=str(tmp_path), **{**RUN, **given})
            for callback in callbacks:
                ours.add_callback(callback)
            ours.train(resume_from_checkpoint=resume)
            torch.save(weights(ours), tmp_path / "end")

        return forked(work)

    return train


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def steps(folder):
    return sorted(checkpoints.step_of(path) for path in folder.glob("checkpoint-*"))


def undisturbed(made, cls=Trainer, model=None, **given):
    stock = made(cls, model, **{**RUN, **given})
    stock.train()
    return weights(stock)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_a_checkpoint_at_the_step_s_end(made, trains, tmp_path, number, code):
    assert trains(Signals(number)) == code
    assert steps(tmp_path) == [3]
    assert not (tmp_path / "end").exists()  # the script does not go on as if it were done
    (event,) = events(tmp_path)
    assert (event["event"], event["signal"], event["step"]) == ("stopped", number.name, 3)
    assert 0 < event["seconds"] < 5
    assert trains(resume=True) == 0
    assert same(torch.load(tmp_path / "end"), undisturbed(made))


def test_a_second_signal_kills_even_within_the_save(made, trains, tmp_path):
    def before():
        genuine = torch.save

        def save(content, path, *args, **kwargs):
            genuine(content, path, *args, **kwargs)
            if "checkpoint-3" in str(path) and str(path).endswith("optimizer.pt"):
                os.kill(os.getpid(), signal.SIGTERM)

        torch.save = save

    given = {"save_strategy": "steps", "save_steps": 2}
    assert trains(Signals(signal.SIGTERM), before=before, **given) == -signal.SIGTERM
    assert steps(tmp_path) == [2]
    assert (tmp_path / "_saving").exists()
    assert trains(resume=True, **given) == 0
    assert same(torch.load(tmp_path / "end"), undisturbed(made))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_signals_kill_at_once(trains, tmp_path, number):
    assert trains(Signals(number, number)) == -number
    assert steps(tmp_path) == []


class Predicting(TrainerCallback):
    """As an evaluation's prediction step of a number ends, from one training step on: a signal, SIGKILL with the next.

    Args:
        number: of the signal; None sends none.
        step: of training.
        deadly: whether there must be no other prediction step.
    """

    def __init__(self, number, step=1, deadly=True):
        self.number, self.step, self.deadly, self.count = number, step, deadly, 0

    def on_prediction_step(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            self.count += 1
            if self.count == 1 and self.number is not None:
                os.kill(os.getpid(), self.number)
            if self.count == 2 and self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)


# Of eight prediction steps each.
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": examples(), "per_device_eval_batch_size": 2}


@pytest.mark.parametrize(
    ("number", "code", "step"), [(signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 4)]
)
def test_a_signal_in_an_evaluation_ends_it_at_its_next_step_with_a_checkpoint(
    made, trains, with_dropout, tmp_path, number, code, step
):
    """Also with an epoch's last step."""
    given = {**EVALUATED, "model": with_dropout}
    assert trains(Predicting(number, step=step), **given) == code
    assert steps(tmp_path) == [step]
    (event,) = events(tmp_path)
    assert (event["step"], event["unevaluated"]) == (step, True)
    assert 0 < event["seconds"] < 5
    assert trains(resume=True, **given) == 0
    assert same(torch.load(tmp_path / "end"), undisturbed(made, **given))


def test_evaluation_is_not_waited_for(made, trains, with_dropout, tmp_path):
    """In the middle of an epoch there is none; one that is due at the step is ended as soon as it has begun."""
    evaluated = {"eval_strategy": "epoch", "eval_dataset": examples()}
    assert trains(Signals(signal.SIGTERM), Predicting(None), **evaluated) == 143
    assert steps(tmp_path) == [3]
    given = {**EVALUATED, "eval_steps": 5, "model": with_dropout}
    (tmp_path / "checkpoint-3").rename(tmp_path / "other")
    assert trains(Signals(signal.SIGTERM, step=4), Predicting(None), **given) == 143
    assert steps(tmp_path) == [5]
    assert trains(resume=True, **given) == 0
    assert same(torch.load(tmp_path / "end"), undisturbed(made, **given))


class Sampling(AutoFitTrainer):
    """Its evaluation takes random numbers, which the next steps then do not get."""

    def prediction_step(self, *args, **kwargs):
        torch.rand(3)
        return super().prediction_step(*args, **kwargs)


COUNTED = {
    "the best model": {"metric_for_best_model": "loss"},
    "several": {"eval_dataset": {"one": examples(), "other": examples()}},
    "sampling": {"cls": Sampling},
}


@pytest.mark.parametrize("name", COUNTED)
def test_an_evaluation_that_something_depends_on_is_waited_for_but_a_checkpoint_comes_first(
    made, trains, with_dropout, tmp_path, name
):
    given = {**EVALUATED, "model": with_dropout, **COUNTED[name]}

    class ThirdKills(Predicting):
        def on_prediction_step(self, args, state, control, **kwargs):
            super().on_prediction_step(args, state, control, **kwargs)
            if self.count == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    assert trains(ThirdKills(signal.SIGTERM, step=2, deadly=False), **given) == -signal.SIGKILL
    assert steps(tmp_path) == [2]
    (tmp_path / "checkpoint-2").rename(tmp_path / "first")
    assert trains(Predicting(signal.SIGTERM, step=2, deadly=False), **given) == 143
    assert steps(tmp_path) == [2]
    history = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert {line["step"] for line in history if any("loss" in key and "eval" in key for key in line)} == {1, 2}
    assert trains(resume=True, **given) == 0
    assert same(torch.load(tmp_path / "end"), undisturbed(made, **given))


def test_a_signal_with_an_evaluation_s_last_step_takes_no_other_step_of_training(made, trains, with_dropout, tmp_path):
    given = {**EVALUATED, "per_device_eval_batch_size": 16, "model": with_dropout}
    assert trains(Predicting(signal.SIGTERM, step=2), **given) == 143
    assert steps(tmp_path) == [2]
    assert "unevaluated" not in events(tmp_path)[0]
    assert trains(resume=True, **given) == 0
    assert same(torch.load(tmp_path / "end"), undisturbed(made, **given))


@pytest.mark.parametrize("counts", [False, True])
def test_at_an_epoch_s_last_step_the_epoch_is_ended(made, trains, with_dropout, tmp_path, counts):
    given = {**EVALUATED, "eval_strategy": "epoch", "model": with_dropout}
    given |= {"metric_for_best_model": "loss"} if counts else {}
    assert trains(Signals(signal.SIGTERM, step=3), Predicting(None, deadly=not counts), **given) == 143
    assert steps(tmp_path) == [4]
    (event,) = events(tmp_path)
    assert event.get("unevaluated", False) is not counts
    history = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in history if "eval_loss" in line] == ([4] if counts else [])
    assert trains(resume=True, **given) == 0
    assert same(torch.load(tmp_path / "end"), undisturbed(made, **given))


def test_handlers_of_the_script_are_called_too_and_stand_again_afterwards(made, tmp_path):
    got = []

    def handler(number, frame):
        got.append(number)

    before = signal.signal(signal.SIGTERM, handler)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        ours = made(AutoFitTrainer, output_dir=str(tmp_path), **RUN)
        ours.add_callback(Signals(signal.SIGTERM))
        with pytest.raises(Stopped) as stopped:
            ours.train()
        assert stopped.value.code == 143
        assert got == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_after_the_last_step_comes_when_training_is_over(trains, tmp_path):
    class Late(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    assert trains(Late()) == -signal.SIGTERM
    assert trains(Signals(signal.SIGINT), before=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) == 0


def test_out_of_a_thread_training_goes_as_ever(made, tmp_path):
    ours = made(AutoFitTrainer, output_dir=str(tmp_path), **RUN)
    thread = threading.Thread(target=ours.train)
    thread.start()
    thread.join()
    assert ours.state.global_step == 6


def test_the_time_to_the_end_is_a_step_and_a_save(trains, tmp_path):
    """Steps of half a second: the signal comes in the first half of one."""

    class Half(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            time.sleep(0.5)

    begun = time.monotonic()
    assert trains(Half(), Signals(signal.SIGTERM, step=0), max_steps=100) == 143
    assert time.monotonic() - begun < 2
    assert trains(Signals(signal.SIGTERM), dataloader_num_workers=1, resume=True, max_steps=100) == 143
