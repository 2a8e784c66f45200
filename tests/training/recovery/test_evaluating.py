"""Evaluation that runs out of memory: the same again, then in fewer rows, then with results on the host."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer

from autofit.errors import OutOfBudget
from autofit.training.recovery.trainers import AutoFitTrainer
from tests.training.recovery.conftest import FailingAllocations, examples, pad, same, weights

AGAIN = "freed memory and tried the same again"
TO_HOST = "again, results to the host each step"


def evaluated(trainer, fail=()):
    with FailingAllocations(fail) as counter:
        return trainer.evaluate(examples()[:6]), counter.count


def halved(times=1):
    """Faults that halve the rows of an evaluation's first batch so often: each size is tried twice."""
    return FailingAllocations(range(10, 10 + 10 * times, 5))


def test_an_evaluation_that_runs_out_of_memory_once_is_the_same(made):
    expected, _ = evaluated(made(Trainer, per_device_eval_batch_size=6))
    _, count = evaluated(made(AutoFitTrainer, per_device_eval_batch_size=6))
    for number in range(0, count, 5):
        ours = made(AutoFitTrainer, per_device_eval_batch_size=6)
        try:
            found, _ = evaluated(ours, {number})
        except torch.OutOfMemoryError:  # where a batch is fetched
            assert number < 3
            continue
        assert found["eval_loss"] == expected["eval_loss"]
        assert [event["did"] for event in ours.recovery.events] == [AGAIN]
        assert ours._most_tokens is None


def test_evaluation_shrinks_on_its_own_where_it_runs_out_of_memory_twice(made):
    expected, _ = evaluated(made(Trainer, per_device_eval_batch_size=6))
    ours = made(AutoFitTrainer, per_device_eval_batch_size=6)
    with halved():
        assert ours.evaluate(examples()[:6])["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert [event["did"][:9] for event in ours.recovery.events] == ["freed mem", "fewer tha"]
    assert ours._eval_rows == 3
    assert ours.evaluate(examples()[:6])["eval_loss"] == expected["eval_loss"]  # of whole batches again
    with pytest.raises(OutOfBudget, match="evaluation does not fit, with 1 rows"):
        evaluated(made(AutoFitTrainer, per_device_eval_batch_size=6), range(3, 10_000))


def test_single_out_of_memories_here_and_there_never_end_an_evaluation(made):
    given = {"per_device_eval_batch_size": 1, "eval_dataset": examples()}
    expected = made(Trainer, **given).evaluate()["eval_loss"]
    ours = made(AutoFitTrainer, **given)
    with FailingAllocations(range(20, 100_000, 100)):
        assert ours.evaluate()["eval_loss"] == expected
    assert len(ours.recovery.events) > 3


def test_predictions_of_the_parts_are_those_of_the_whole(made):
    expected = made(Trainer, per_device_eval_batch_size=6).predict(examples()[:6])
    ours = made(AutoFitTrainer, per_device_eval_batch_size=6)
    with halved():
        found = ours.predict(examples()[:6])
    assert ours._eval_rows == 3
    assert found.predictions.shape == expected.predictions.shape
    real = expected.label_ids != -100
    assert torch.allclose(torch.tensor(found.predictions[real]), torch.tensor(expected.predictions[real]), atol=1e-5)


class Towers(nn.Module):
    """Says how near each row is to each, or how warm it is; takes so many rows."""

    def __init__(self, says, fits):
        super().__init__()
        self.inner, self.says, self.fits = nn.Linear(8, 64), says, fits

    def forward(self, x):
        if len(x) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        found = self.inner(x)
        if self.says == "squeezed":  # of one row alone it has no rows
            return {"first": found[:, :1].squeeze()}
        return {"near": found @ found.T} if self.says == "near" else {"found": found, "warmth": torch.ones(())}


@pytest.mark.parametrize("says", ["near", "warmth", "squeezed"])
@pytest.mark.parametrize("fits", [1, 2])
def test_results_of_all_rows_together_are_not_put_together(made, says, fits):
    data = [{"x": torch.full((8,), float(number))} for number in range(4)]
    given = {"label_names": [], "data_collator": None, "per_device_eval_batch_size": 4}
    ours = made(AutoFitTrainer, Towers(says, fits), **given)
    with pytest.raises(OutOfBudget, match="not all of its results are those of single rows"):
        ours.predict(data)


def test_the_loss_of_evaluation_is_put_together_as_what_it_is(made):
    def mean_over_rows(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].float().transpose(1, 2)
        token = nn.functional.cross_entropy(logits, labels[:, 1:], ignore_index=-100, reduction="none")
        return (token.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()

    def all_together(outputs, labels, num_items_in_batch=None):
        states = outputs.logits.float().mean(1)
        return (states @ states.T).logsumexp(1).mean()

    given = {"per_device_eval_batch_size": 6, "compute_loss_func": mean_over_rows}
    expected = made(Trainer, **given).evaluate(examples()[:6])
    ours = made(AutoFitTrainer, **given)
    with halved():
        assert ours.evaluate(examples()[:6])["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    ours = made(AutoFitTrainer, **{**given, "compute_loss_func": all_together})
    with pytest.raises(OutOfBudget, match="takes all rows of a batch together"), halved():
        ours.evaluate(examples()[:6])


def test_evaluation_leaves_out_parts_without_a_trained_token(made):
    def one_untrained(rows):
        batch = pad(rows)
        longest = batch["attention_mask"].sum(1).argmax()
        batch["labels"][longest] = -100
        return batch

    def mean(outputs, labels, num_items_in_batch=None):
        kept = labels[:, 1:].reshape(-1)
        return nn.functional.cross_entropy(outputs.logits[:, :-1].reshape(len(kept), -1), kept)

    given = {"eval_dataset": examples(), "data_collator": one_untrained, "compute_loss_func": mean}
    ours = made(AutoFitTrainer, **given)
    expected = made(Trainer, **given).evaluate()["eval_loss"]
    with halved(3):
        assert ours.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert ours._eval_rows == 1


def test_predictions_that_pile_up_and_do_not_fit_are_made_again_with_results_on_the_host(made):
    data = examples()[:12]
    given = {"per_device_eval_batch_size": 4}
    expected = made(Trainer, **given).predict(data)
    counter = FailingAllocations()
    with counter:
        made(AutoFitTrainer, **given).predict(data)
    did = []
    for number in range(counter.count):
        ours = made(AutoFitTrainer, **given)
        with FailingAllocations({number}):
            found = ours.predict(data)
        assert np.array_equal(found.predictions, expected.predictions), number
        assert np.array_equal(found.label_ids, expected.label_ids)
        assert found.metrics["test_loss"] == expected.metrics["test_loss"]
        assert ours.args.eval_accumulation_steps is None  # as the script has it
        did += [event["did"] for event in ours.recovery.events]
    assert set(did) == {AGAIN, TO_HOST}
    with pytest.raises(OutOfBudget, match="evaluation does not fit, tried 3 times"):
        piling_up(made(AutoFitTrainer, **given)).predict(data)


def piling_up(trainer):
    """What lies between its prediction steps never fits."""

    def gather(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.gather_function = trainer.accelerator.gather_for_metrics = gather
    return trainer


class Generating:
    """Its evaluation writes a few tokens after each prompt."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        written = model.generate(inputs["input_ids"][:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
        return None, written, inputs["labels"]


class StockGenerating(Generating, Trainer):
    pass


class OursGenerating(Generating, AutoFitTrainer):
    pass


def test_generate_within_an_evaluation_is_done_again_and_never_touches_training(made, with_dropout):
    def trained(cls, fails=()):
        def compute_metrics(prediction):
            return {"written": int(np.sum(prediction.predictions))}

        given = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": examples()[:8], "max_steps": 2}
        trainer = made(cls, with_dropout, per_device_eval_batch_size=4, compute_metrics=compute_metrics, **given)
        evaluate, around = trainer.evaluate, FailingAllocations(fails)

        def failing(*args, **kwargs):
            with around:
                return evaluate(*args, **kwargs)

        trainer.evaluate = failing
        trainer.train()
        written = [line["eval_written"] for line in trainer.state.log_history if "eval_written" in line]
        return trainer, written, around.count

    stock, expected, count = trained(StockGenerating)
    assert len(expected) == 2
    for number in range(3, count - 9, count // 12):
        ours, found, _ = trained(OursGenerating, {number})
        assert found == expected, number
        assert same(weights(stock), weights(ours))
        assert [(event["phase"], event["did"]) for event in ours.recovery.events] == [("eval", TO_HOST)]
        assert (ours._most_tokens, ours._kind) == (None, None)
