"""Two ranks over gloo: checkpoints, resumes and evaluations are those of the stock class."""

import copy

import pytest
import torch
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

from autofit.training import checkpoints
from autofit.training.recovery.trainers import AutoFitSFTTrainer, AutoFitTrainer
from tests.training.recovery.conftest import FailingAllocations, same
from tests.training.recovery.ranks.conftest import SAVED, plain, said, sft
from tests.training.recovery.ranks.paired import together


class StopAfter(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2


@pytest.mark.parametrize(
    ("cls", "stock_class", "make"), [(AutoFitTrainer, Trainer, plain), (AutoFitSFTTrainer, SFTTrainer, sft)]
)
def test_a_run_that_goes_on_ends_as_it_would_have(trained, tmp_path, tiny_llama, cls, stock_class, make):
    model = copy.deepcopy(tiny_llama)
    model.model.layers[0].self_attn.attention_dropout = 0.3  # each rank draws its own
    stock = said(trained(stock_class, make=make, model=model, max_steps=4))

    def make_first(*asked, **given):
        trainer = make(*asked, **given)
        trainer.add_callback(StopAfter())
        return trainer

    said(trained(cls, make=make_first, model=model, **SAVED))
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert checkpoints.verify(checkpoint) == []
    assert {"rng_state_0.pth", "rng_state_1.pth", checkpoints.MANIFEST} <= {path.name for path in checkpoint.iterdir()}
    assert checkpoints.facts_of(checkpoint)["samples"] == 16
    for again, resume in ((cls, True), (stock_class, str(checkpoint))):
        ours = said(trained(again, make=make, model=model, resume=resume, **SAVED))
        for expected, found in zip(stock, ours, strict=True):
            assert same(expected["weights"], found["weights"])
    assert not list((tmp_path / "run").glob("_*"))
    with pytest.raises(AssertionError, match="is of 2 processes, not 1"):
        alone = together(tmp_path / "alone", lambda rank: make(cls, model, tmp_path, **SAVED).train(str(checkpoint)), 1)
        assert alone.codes == [0], alone.wrote[0]


def test_the_best_model_is_kept_and_loaded(trained, tmp_path):
    """The stock class waits for all ranks in the middle of such a save."""
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1, **SAVED}
    stock, ours = said(trained(Trainer, **best)), said(trained(AutoFitTrainer, **best))
    assert same(stock[0]["weights"], ours[0]["weights"])
    assert same(stock[0]["weights"], ours[1]["weights"])


def test_a_full_disk_ends_all_and_leaves_what_there_was(trained, tmp_path):
    def before():
        genuine = torch.save

        def save(content, path, *args, **kwargs):
            if "checkpoint-4" in str(path) and str(path).endswith("optimizer.pt"):
                raise OSError(28, "No space left on device")
            genuine(content, path, *args, **kwargs)

        torch.save = save

    ranks = trained(AutoFitTrainer, before=before, **SAVED)
    assert ranks.codes == [1, 1]
    assert max(ranks.seconds) < 8
    assert all("checkpoint-4 could not be written" in wrote for wrote in ranks.wrote)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def evaluated(cls, rank_fails, tiny_llama, folder, make):
    def work(rank):
        trainer = make(cls, tiny_llama, folder, per_device_eval_batch_size=4)
        with FailingAllocations(rank_fails if rank == 1 else ()) as counter:
            found = trainer.evaluate()
        events = (
            [event["did"] for event in trainer.recovery.events]
            if cls is not Trainer and hasattr(trainer, "recovery")
            else []
        )
        return {k: v for k, v in found.items() if "second" not in k and "time" not in k}, events, counter.count

    return together(folder / "ranks", work)


@pytest.mark.parametrize(
    ("cls", "stock_class", "make"), [(AutoFitTrainer, Trainer, plain), (AutoFitSFTTrainer, SFTTrainer, sft)]
)
def test_evaluation_shrinks_on_one_rank_alone(tiny_llama, tmp_path, cls, stock_class, make):
    stock = said(evaluated(stock_class, (), tiny_llama, tmp_path, make))
    undisturbed = said(evaluated(cls, (), tiny_llama, tmp_path, make))
    assert [one[0] for one in undisturbed] == [one[0] for one in stock]
    third = undisturbed[1][2] // 3
    ours = said(evaluated(cls, {third, third + 5}, tiny_llama, tmp_path, make))
    assert ours[0][1] == []
    assert ours[1][1] == ["freed memory and tried the same again", "fewer than 4 rows at a time"]
    for expected, found in zip(stock, ours, strict=True):
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
    ranks = evaluated(cls, range(undisturbed[1][2] // 3, 10**6), tiny_llama, tmp_path, make)
    assert ranks.codes == [1, 1]
    assert max(ranks.seconds) < 15
    assert all("OutOfBudget: rank 1: evaluation does not fit" in wrote for wrote in ranks.wrote)
