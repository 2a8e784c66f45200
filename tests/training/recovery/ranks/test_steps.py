"""Two ranks over gloo: the stock class's result through out-of-memory on one of them."""

import copy

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

from autofit.memory.ledger import Ledger
from autofit.training.recovery import reducing
from autofit.training.recovery.trainers import AutoFitSFTTrainer, AutoFitTrainer
from tests.training.recovery.conftest import FailingAllocations, farthest, same
from tests.training.recovery.ranks.conftest import (
    counting,
    did,
    failing,
    plain,
    said,
    sft,
)


def test_undisturbed_it_is_the_stock_class_bit_for_bit(trained):
    stock, ours = said(trained(Trainer)), said(trained(AutoFitTrainer))
    assert same(ours[0]["weights"], ours[1]["weights"])
    for expected, found in zip(stock, ours, strict=True):
        assert same(expected["weights"], found["weights"])
        assert expected["logged"] == found["logged"]
        assert found["events"] == []


@pytest.mark.parametrize("given", [{}, {"max_steps": 5}])
def test_trl_s_trainer_too_with_what_it_logs(trained, given):
    """Five steps go over an epoch's end; evaluation gathers figures of its own."""
    given |= {"eval_strategy": "steps", "eval_steps": 1}
    stock, ours = said(trained(SFTTrainer, make=sft, **given)), said(trained(AutoFitSFTTrainer, make=sft, **given))
    for expected, found in zip(stock, ours, strict=True):
        assert same(expected["weights"], found["weights"])
        times = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
        of_stock, of_ours = (
            [{k: v for k, v in e.items() if k not in times} for e in x["logged"]] for x in (expected, found)
        )
        assert of_stock == of_ours
        assert {"entropy", "num_tokens", "mean_token_accuracy"} <= set(of_ours[0])


@pytest.mark.parametrize(
    ("cls", "stock_class", "make"), [(AutoFitTrainer, Trainer, plain), (AutoFitSFTTrainer, SFTTrainer, sft)]
)
def test_a_fault_on_one_rank_changes_nothing(trained, cls, stock_class, make):
    stock = said(trained(stock_class, make=make))
    count = said(trained(cls, counting, make=make))[1]["count"]
    for share in (0.1, 0.2, 0.3, 0.4, 0.7, 0.9):  # forward, backward, optimizer, of both steps
        ours = said(trained(cls, failing(int(share * count)), make=make))
        for expected, found in zip(stock, ours, strict=True):
            assert same(expected["weights"], found["weights"]), share
            assert expected["logged"] == found["logged"]
        assert [len(one["events"]) for one in ours] == [0, 1], share
        assert ours[1]["events"][0]["rank"] == 1


def test_dropout_draws_the_same_again_on_each_rank(trained, tiny_llama):
    model = copy.deepcopy(tiny_llama)
    model.model.layers[0].self_attn.attention_dropout = 0.3
    stock = said(trained(Trainer, model=model))
    count = said(trained(AutoFitTrainer, counting, model=model))[1]["count"]
    ours = said(trained(AutoFitTrainer, failing(count // 3), model=model))
    assert same(stock[0]["weights"], ours[0]["weights"])
    assert did(ours[1]) == ["freed memory and tried the same again"]


@pytest.mark.parametrize(
    ("cls", "stock_class", "make"), [(AutoFitTrainer, Trainer, plain), (AutoFitSFTTrainer, SFTTrainer, sft)]
)
def test_one_rank_cuts_finer_on_its_own(trained, cls, stock_class, make):
    stock = said(trained(stock_class, make=make))
    count = said(trained(cls, counting, make=make))[1]["count"]
    ours = said(trained(cls, failing(count // 5, count // 5 + count // 8), make=make))
    assert same(ours[0]["weights"], ours[1]["weights"])
    assert farthest(stock[0]["weights"], ours[0]["weights"], stock[0]["start"]) < 1e-6
    assert did(ours[0]) == []
    assert any("cut into pieces" in one for one in did(ours[1]))
    for expected, found in zip(stock[0]["logged"], ours[0]["logged"], strict=True):
        assert expected.keys() == found.keys()
        assert expected.get("num_tokens") == found.get("num_tokens")
        assert found.get("loss", 0) == pytest.approx(expected.get("loss", 0), rel=1e-5)
        # By tokens, not micro-batches.
        assert found.get("entropy", 0) == pytest.approx(expected.get("entropy", 0), rel=2e-2)


def test_three_ranks_agree_as_two_do(trained):
    """What three add up depends on the order in the last digits, and that is the library's."""
    given = {"ranks": 3, "optim": "sgd", "learning_rate": 1.0}  # Adam makes much of last digits
    stock = said(trained(Trainer, **given))
    undisturbed = said(trained(AutoFitTrainer, counting, **given))
    count = undisturbed[1]["count"]
    fault, cut = (
        said(trained(AutoFitTrainer, failing(*numbers), **given))
        for numbers in ((count // 3,), (count // 5, count // 5 + count // 8))
    )
    for ours, ooms in ((undisturbed, 0), (fault, 1), (cut, 2)):
        assert [len(did(one)) for one in ours] == [0, ooms, 0]
        assert all(same(one["weights"], ours[0]["weights"]) for one in ours)
        assert farthest(stock[0]["weights"], ours[0]["weights"], stock[0]["start"]) < 1e-6
    assert same(fault[0]["weights"], undisturbed[0]["weights"])
    assert [one["logged"] for one in fault] == [one["logged"] for one in undisturbed]


def limited(limit_bytes=None):
    """Counts what a rank holds, or holds it to that."""

    def enter(trainer):
        ledger = Ledger(limit_bytes)
        ledger.hold([*trainer.model.parameters(), *trainer.model.buffers()])
        return ledger

    return enter


def test_under_a_limit_on_one_rank_all_train_on_or_all_say_that_they_cannot(trained, tiny_llama):
    stock = said(trained(Trainer))
    held = sum(tensor.nbytes for tensor in (*tiny_llama.parameters(), *tiny_llama.buffers()))
    room = said(trained(AutoFitTrainer, limited()))[1]["peak_bytes"] - held
    outcomes = []
    for share in (0.9, 0.7, 0.5, 0.3):  # with less the wrapper cannot even be made
        ranks = trained(AutoFitTrainer, limited(held + int(share * room)))
        if ranks.codes != [0, 0]:
            assert ranks.codes == [1, 1], ranks.wrote
            # As alone: where the stock class itself takes memory, its own error is raised.
            says = ("OutOfBudget: rank 1: ", "OutOfMemoryError: CPU budget out of memory")
            assert all(any(words in wrote for words in says) for wrote in ranks.wrote), "\n".join(ranks.wrote)
            assert max(ranks.seconds) < 8
            outcomes.append("ended")
            continue
        ours = ranks.said
        outcomes.append("cut" if any("cut" in one for one in did(ours[1])) else "trained")
        assert farthest(stock[0]["weights"], ours[0]["weights"], stock[0]["start"]) < 1e-6
        assert same(ours[0]["weights"], ours[1]["weights"])
    assert "cut" in outcomes, outcomes
    assert outcomes[-1] == "ended", outcomes


def always_after(trainer):
    """From the second step's begin on nothing fits any more."""
    mode = FailingAllocations()

    class Begin(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                mode.fail = range(10**9)

    trainer.add_callback(Begin())
    return mode


def in_the_optimizer(trainer):
    mode = FailingAllocations()

    class Before(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            mode.fail = range(10**9)

    trainer.add_callback(Before())
    return mode


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        (always_after, "step 2 does not fit|snapshot does not fit|fetch does not fit"),
        (in_the_optimizer, "does not fit"),
    ],
)
def test_out_of_budget_on_one_rank_ends_all_promptly_and_says_which(trained, mode, why):
    ranks = trained(AutoFitTrainer, mode, ddp_timeout=1000)
    assert ranks.codes == [1, 1]
    assert max(ranks.seconds) < 8
    for wrote in ranks.wrote:
        last = wrote.strip().splitlines()[-1]
        assert last.startswith("autofit.errors.OutOfBudget: rank 1: "), wrote
        assert any(words in last for words in why.split("|")), last


def forget_to_reduce():
    reducing._reduce = lambda *asked: None


def reduce_the_sum():
    def total(gradients, wrapper):
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)

    reducing._reduce = total


@pytest.mark.parametrize("defect", [forget_to_reduce, reduce_the_sum])
def test_planted_defects_are_seen(trained, defect):
    stock, ours = said(trained(Trainer)), said(trained(AutoFitTrainer, before=defect))
    assert farthest(stock[0]["weights"], ours[0]["weights"], stock[0]["start"]) > 1e-4


class Image(nn.Module):
    """With batch norm, a layer that only some rows go through, and one that none does."""

    def __init__(self):
        super().__init__()
        self.norm, self.sometimes, self.head = nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.never = nn.Linear(8, 8)

    def forward(self, values, labels=None):
        hidden = self.norm(values)
        if (values[:, 0] > 100).any():
            hidden = self.sometimes(hidden)
        logits = self.head(hidden)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def images(cls, model, folder, **given):
    draw = torch.Generator().manual_seed(5)
    rows = [{"values": torch.randn(8, generator=draw), "labels": i % 2} for i in range(32)]
    rows[20]["values"][0] = 1000.0
    data = {"train_dataset": rows}
    return plain(cls, model, folder, data, max_steps=4, remove_unused_columns=False, weight_decay=0.1, **given)


def test_buffers_and_unused_parameters_are_as_in_the_stock_class(trained):
    torch.manual_seed(0)
    model = Image()
    stock, ours = (
        said(trained(Trainer, make=images, model=model)),
        said(trained(AutoFitTrainer, make=images, model=model)),
    )
    start, after = stock[0]["start"], stock[0]["weights"]
    assert not torch.equal(start["sometimes.weight"], after["sometimes.weight"])
    assert torch.equal(start["never.weight"], after["never.weight"])
    for expected, found in zip(stock, ours, strict=True):
        assert same(expected["weights"], found["weights"])
        assert expected["logged"] == found["logged"]
