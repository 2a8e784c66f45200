"""Two ranks over gloo: nobody waits for ever for one that is gone, and a signal to one ends all alike."""

import os
import signal
import time

import pytest
from transformers import Trainer, TrainerCallback

from autofit.training import checkpoints
from autofit.training.recovery.trainers import AutoFitTrainer
from tests.training.recovery.conftest import same
from tests.training.recovery.ranks.conftest import plain, said
from tests.training.recovery.ranks.paired import together


class At(TrainerCallback):
    """Does something on its rank as a step begins."""

    def __init__(self, work, step=1):
        self.work, self.step = work, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.work()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_ever():
    time.sleep(1000)


def raise_an_error():
    raise ValueError("the script's own")


@pytest.mark.parametrize(
    ("work", "codes", "says", "seconds"),
    [
        (kill, [1, -9], "at the gradients: another rank was killed, or did not come within 4 seconds", 5),
        (wait_for_ever, [1, None], "at the gradients: another rank was killed, or did not come within 4 seconds", 10),
        (raise_an_error, [1, 1], "rank 1: left with ValueError: the script's own", 5),
    ],
)
def test_who_is_gone_or_does_not_come_is_not_waited_for(trained, tiny_llama, tmp_path, work, codes, says, seconds):
    def train(rank):
        trainer = plain(AutoFitTrainer, tiny_llama, tmp_path, ddp_timeout=4)
        if rank == 1:
            trainer.add_callback(At(work))
        trainer.train()

    begun = time.monotonic()
    ranks = together(tmp_path / "ranks", train, most_seconds=10)
    assert ranks.codes == codes, ranks.wrote
    assert ranks.seconds[0] < seconds
    assert time.monotonic() - begun < 14
    last = ranks.wrote[0].strip().splitlines()[-1]
    assert last.startswith("autofit.errors.AutofitError: rank ")
    assert says in last
    assert ranks.wrote[0].count("Traceback (most recent call last)") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143)])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(trained, tiny_llama, tmp_path, number, code):
    given = {"max_steps": 6, "per_device_train_batch_size": 1}
    stock = said(trained(Trainer, **given))

    def train(rank):
        trainer = plain(AutoFitTrainer, tiny_llama, tmp_path, **given)
        if rank == 1:
            trainer.add_callback(At(lambda: os.kill(os.getpid(), number), step=2))
        trainer.train()

    ranks = together(tmp_path / "ranks", train)
    assert ranks.codes == [code, code], ranks.wrote
    assert max(ranks.seconds) < 8
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-3"]
    assert checkpoints.verify(tmp_path / "run" / "checkpoint-3") == []
    ours = said(trained(AutoFitTrainer, resume=True, **given))
    assert same(stock[1]["weights"], ours[1]["weights"])


class SignalInEvaluation(TrainerCallback):
    """SIGTERM with the first prediction step after training step 2; there must not be a third."""

    def __init__(self):
        self.count = 0

    def on_prediction_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.count += 1
            os.kill(os.getpid(), {1: signal.SIGTERM, 3: signal.SIGKILL}.get(self.count, 0))


def test_a_signal_to_one_rank_in_an_evaluation_ends_it_on_all(trained, tiny_llama, with_dropout, tmp_path):
    """Dropout, of which each rank draws its own."""
    given = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 1}
    stock = said(trained(Trainer, model=with_dropout, **given))
    ranks = trained(AutoFitTrainer, model=with_dropout, callback=SignalInEvaluation(), **given)
    assert ranks.codes == [143, 143], ranks.wrote
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-2"]
    ours = said(trained(AutoFitTrainer, model=with_dropout, resume=True, **given))
    for expected, found in zip(stock, ours, strict=True):
        assert same(expected["weights"], found["weights"])
