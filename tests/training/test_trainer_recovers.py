"""Running out of memory inside the training of a run changes nothing in its result."""

import itertools
import json
import os
import signal

import pytest
import torch

from autofit.errors import OutOfBudget
from autofit.training.child import _run
from tests.training.recovery.conftest import FailingAllocations
from tests.training.recovery.forked import forked
from tests.training.trainers import CANDIDATE, adapters, losses, trainer


def faulty(made, allocations):
    """Trains while these allocations fail; the trainer's own adapters afterwards."""
    counter = FailingAllocations(allocations)
    with counter:
        made.train()
    return adapters(made.model), counter.count


@pytest.mark.parametrize("layers", [0, 2])
def test_an_out_of_memory_inside_training_changes_nothing(tiny_source, tmp_path, layers):
    candidate = CANDIDATE.replace(checkpointed_layers=layers, lora_dropout=0.1)
    undisturbed, _ = trainer(tiny_source, tmp_path / "undisturbed", candidate, max_steps=2)
    expected, count = faulty(undisturbed, ())
    for number in range(count // 12, count, count // 6):
        made, _ = trainer(tiny_source, tmp_path / str(number), candidate, max_steps=2)
        found, _ = faulty(made, {number})
        assert all(torch.equal(expected[n], found[n]) for n in expected), number
        assert losses(tmp_path / str(number)) == losses(tmp_path / "undisturbed")
        assert [event["event"] for event in made.recovery.events] == ["oom"]


def test_an_out_of_memory_in_clipping_changes_nothing(tiny_source, tmp_path):
    undisturbed, _ = trainer(tiny_source, tmp_path / "undisturbed", max_steps=1)
    clip, seen = undisturbed._whole, []
    with FailingAllocations(least=1) as counter:
        undisturbed._whole = lambda *args: (seen.append(counter.count), clip(*args), seen.append(counter.count))[1]
        undisturbed.train()
    first, end = seen[:2]
    assert end - first > 20
    for number in (first, (first + end) // 2, end - 1):
        made, _ = trainer(tiny_source, tmp_path / str(number), max_steps=1)
        with FailingAllocations({number}, least=1):
            made.train()
        expected, found = adapters(undisturbed.model), adapters(made.model)
        assert all(torch.equal(expected[n], found[n]) for n in expected), number
        assert [event["phase"] for event in made.recovery.events] == ["clipping"]


def out_of_memory(model, batch):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_step_that_does_not_fit_is_cut_and_then_given_up(tiny_source, tmp_path):
    whole, _ = trainer(tiny_source, tmp_path / "whole", max_steps=2)
    expected, count = faulty(whole, ())
    cut, _ = trainer(tiny_source, tmp_path / "cut", max_steps=2)
    found, _ = faulty(cut, {count // 4, count // 4 + 60})
    assert all(torch.allclose(expected[n], found[n], atol=1e-4) for n in expected)
    assert [event["did"][:3] for event in cut.recovery.events] == ["fre", "cut"]
    lines = (tmp_path / "cut" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["oom", "oom"]
    hopeless, _ = trainer(tiny_source, tmp_path / "hopeless", max_steps=2)
    hopeless.step.loss = out_of_memory
    with pytest.raises(OutOfBudget, match=r"step 1 does not fit: a sequence of \d+ tokens alone"):
        hopeless.train()


def test_evaluation_that_does_not_fit_is_tried_again_then_cut_and_leaves_training_alone(tiny_source, tmp_path):
    made, _ = trainer(tiny_source, tmp_path, evaluate=True)
    expected = made.evaluate()["eval_loss"]
    with FailingAllocations({40}):
        assert made.evaluate()["eval_loss"] == expected
    with FailingAllocations({40, 60}):
        assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert [event["did"][:3] for event in made.recovery.events] == ["fre", "fre", "cut"]
    assert made.evaluate()["eval_loss"] == expected
    assert made._most_tokens is None


def test_a_signal_in_an_evaluation_ends_it_between_its_micro_batches(tiny_source, tmp_path):
    """All examples are one prediction step here."""
    candidate = CANDIDATE.replace(micro_batch_size=1, lora_dropout=0.1)
    given = {"evaluate": True, "max_steps": 8, "save_steps": 100}
    undisturbed, _ = trainer(tiny_source, tmp_path / "undisturbed", candidate, **given)
    undisturbed.train()
    folder = tmp_path / "run"

    def stopped():
        made, record = trainer(tiny_source, folder, candidate, **given)
        evaluate, count = made.step.evaluate, itertools.count(1)

        def signalled(batch):
            number = next(count)
            if number <= 2:
                os.kill(os.getpid(), signal.SIGTERM if number == 1 else signal.SIGKILL)
            return evaluate(batch)

        made.step.evaluate = signalled
        assert _run(made, record, folder) == (5, False)

    assert forked(stopped) == 0
    (checkpoint,) = folder.glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-5"  # an epoch's last step
    resumed, record = trainer(tiny_source, folder, candidate, **given)
    assert _run(resumed, record, folder) == (8, True)
    for name, parameter in adapters(undisturbed.model).items():
        assert torch.equal(parameter, adapters(resumed.model)[name])
