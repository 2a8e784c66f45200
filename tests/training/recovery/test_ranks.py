"""Two ranks over gloo: the stock class's result through out-of-memory on one of them, and nobody waits for ever."""

import copy
import os
import signal
import time

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from autofit.memory.ledger import Ledger
from autofit.step.tokenizer import byte_tokenizer
from autofit.training import checkpoints
from autofit.training.recovery import reducing
from autofit.training.recovery.trainers import AutoFitSFTTrainer, AutoFitTrainer
from tests.training.recovery.conftest import ARGUMENTS, FailingAllocations, examples, farthest, pad, same, weights
from tests.training.recovery.paired import together

# Two optimizer steps of two micro-batches a rank; a rank that is waited for in vain fails the test soon.
SHARED = {**ARGUMENTS, "per_device_train_batch_size": 2, "ddp_timeout": 10}
OF_TIME = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")


def plain(cls, model, folder, data=None, **given):
    arguments = TrainingArguments(**{**SHARED, "output_dir": str(folder / "run"), **given})
    data = data or {"train_dataset": examples(), "data_collator": pad, "eval_dataset": examples()}
    return cls(model=copy.deepcopy(model), args=arguments, **data)


def sft(cls, model, folder, **given):
    values = {"bf16": False, "remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    values |= {"output_dir": str(folder / "run"), "gradient_checkpointing": False}
    torch.manual_seed(0)
    return cls(
        model=copy.deepcopy(model),
        args=SFTConfig(**{**SHARED, **values, **given}),
        train_dataset=Dataset.from_list(examples()),
        eval_dataset=Dataset.from_list(examples()[:8]),
        data_collator=pad,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
        processing_class=byte_tokenizer(),
    )


def logged(trainer):
    return [{k: v for k, v in line.items() if k not in OF_TIME} for line in trainer.state.log_history]


def summary(trainer, start):
    return {
        "start": start,
        "weights": weights(trainer),
        "logged": logged(trainer),
        "events": trainer.recovery.events if hasattr(trainer, "recovery") else [],
    }


@pytest.fixture
def trained(tiny_llama, tmp_path):
    """Trains a class on two ranks, the second under `mode`; what both say of it."""

    def train(cls, mode=None, make=plain, model=None, resume=None, callback=None, before=None, **given):
        def work(rank):
            if before is not None:
                before()
            trainer = make(cls, model or tiny_llama, tmp_path, **given)
            if callback is not None and rank == 1:
                trainer.add_callback(callback)
            start = weights(trainer)
            if mode is None or rank == 0:
                trainer.train(resume_from_checkpoint=resume)
                return summary(trainer, start)
            entered = mode(trainer)
            with entered:
                trainer.train(resume_from_checkpoint=resume)
            return {**summary(trainer, start), **{k: getattr(entered, k, None) for k in ("count", "peak_bytes")}}

        return together(tmp_path / "ranks", work)

    return train


def said(ranks):
    assert ranks.codes == [0, 0], "\n".join(ranks.wrote)
    return ranks.said


def counting(trainer):
    return FailingAllocations()


def failing(*numbers):
    return lambda trainer: FailingAllocations(numbers)


def did(one):
    return [event["did"] for event in one["events"] if event["event"] == "oom"]


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


SAVED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


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
