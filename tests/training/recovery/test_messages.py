"""Every way of running out of memory that was met, raised inside a training step; and what only looks like one."""

import copy

import pytest
from transformers import Trainer

from autofit.training.recovery.trainers import AutoFitTrainer
from tests.training.recovery.conftest import FailingAllocations, same, weights
from tests.trial.test_classify import COUSINS, HOST, IMPOSTORS, label


def trained(trainer, number=-1, error=None):
    with FailingAllocations({number}, error=copy.copy(error)) as mode:
        trainer.train()
    return weights(trainer), mode.count


@pytest.mark.parametrize("error", [*COUSINS, *HOST], ids=label)
def test_training_goes_on_after_it(made, error):
    expected, _ = trained(made(Trainer, max_steps=1))
    _, count = trained(made(AutoFitTrainer, max_steps=1))
    for number in (100, count - 5):  # in the step; in the optimizer's
        ours = made(AutoFitTrainer, max_steps=1)
        found, _ = trained(ours, number, error)
        assert same(found, expected)
        (event,) = ours.recovery.events
        assert event["event"] == "oom"
        assert event["message"] == (" ".join(str(error).split())[:200] or type(error).__name__)


@pytest.mark.parametrize("error", IMPOSTORS, ids=label)
def test_what_only_looks_like_it_is_raised(made, error):
    ours = made(AutoFitTrainer, max_steps=1)
    with pytest.raises(type(error)):
        trained(ours, 100, error)
    assert ours.recovery.events == []
