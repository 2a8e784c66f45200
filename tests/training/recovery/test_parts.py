"""The parts of recovery: the optimizer's step, evaluation, batches and their cuts, and what is refused."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaAttention
from trl import SFTConfig, SFTTrainer

from autofit.errors import OutOfBudget, UsageError
from autofit.step.tokenizer import byte_tokenizer
from autofit.training.recovery.cutting import LossKind, cut, finer, measure_kind
from autofit.training.recovery.faults import Record, Watch, retried
from autofit.training.recovery.refusals import _refused_of_several
from autofit.training.recovery.rows import can_be_cut, row_lengths, take, together, trained_items
from autofit.training.recovery.trainers import AutoFitSFTTrainer, AutoFitTrainer
from tests.training.recovery.conftest import ARGUMENTS, FailingAllocations, examples, pad, same, weights


def test_nothing_but_an_out_of_memory_is_swallowed():
    with pytest.raises(ValueError, match="mine"), Watch():
        raise ValueError("mine")
    with pytest.raises(OutOfBudget), Watch():
        raise OutOfBudget("really")
    for error in (torch.OutOfMemoryError("x"), RuntimeError("CUDA error: out of memory"), MemoryError()):
        with Watch() as watch:
            raise error
        assert watch.fault


def test_what_never_fits_ends_in_one_line():
    record = Record(None)

    def never():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(OutOfBudget, match="save does not fit, tried 3 times"):
        retried(record, "save", never)
    assert [event["phase"] for event in record.events] == ["save"] * 3


def test_rows_are_taken_without_the_padding_that_all_of_them_have():
    batch = pad(examples()[:4])
    assert row_lengths(batch) == [9, 30, 14, 22]
    part = take(batch, [2, 0])
    assert part["input_ids"].shape == part["labels"].shape == (2, 14)
    assert torch.equal(part["input_ids"][1, :9], batch["input_ids"][0, :9])
    assert trained_items(part, shifted=True) == 13 + 8
    left = {**batch, "attention_mask": batch["attention_mask"].flip(1)}
    assert take(left, [0])["input_ids"].shape == (1, 30)
    assert can_be_cut({**batch, "flag": True})
    assert not can_be_cut({**batch, "table": torch.zeros(3, 3)})
    assert not can_be_cut(take(batch, [0]))


@pytest.mark.parametrize("most", [1, 30, 44, 61, 1000])
def test_a_cut_keeps_every_row_once(most):
    batches = [pad(examples()[:6]), pad(examples()[6:])]
    pieces = cut(batches, most, LossKind.SUM, shifted=True)
    found = sorted(tuple(ids[ids > 0].tolist()) for piece in pieces for ids in piece.batch["input_ids"])
    assert found == sorted(tuple(example["input_ids"]) for example in examples())
    assert all(piece.tokens <= max(most, 30) for piece in pieces)
    assert cut(batches, most, LossKind.WHOLE, shifted=True)[0].batch is batches[0]


def test_all_micro_batches_of_a_step_are_one_pool_sorted_by_length():
    batches = [pad(examples()[i : i + 4]) for i in (0, 4, 8, 12)]
    apart = [piece for batch in batches for piece in cut([batch], 60, LossKind.SUM, shifted=True)]
    pool = cut(batches, 60, LossKind.SUM, shifted=True)
    assert sum(piece.tokens for piece in pool) < sum(piece.tokens for piece in apart)
    longest = [max(row_lengths(piece.batch)) for piece in pool]
    assert longest == sorted(longest, reverse=True)
    assert {piece.weight for piece in pool} == {1.0}
    single = [pad(examples()[i : i + 1]) for i in range(4)]
    assert len(cut(single, 2000, LossKind.SUM, shifted=True)) == 1


def test_means_over_rows_keep_each_row_s_weight_in_the_pool():
    batches = [pad(examples()[i : i + 4]) for i in (0, 4)]
    pieces = cut(batches, 60, LossKind.ROW_MEAN, shifted=True)
    assert sum(piece.weight for piece in pieces) == pytest.approx(2.0)
    assert all(piece.weight == pytest.approx(len(piece.batch["input_ids"]) / 4) for piece in pieces)
    unequal = [pad(examples()[:4]), pad(examples()[4:6])]
    assert sum(piece.weight for piece in cut(unequal, 60, LossKind.ROW_MEAN, shifted=True)) == pytest.approx(2.0)


def test_what_cannot_move_between_batches_stays_where_it_is():
    batches = [pad(examples()[:4]), pad(examples()[4:6])]
    kinds = [{**batch, "token_type_ids": torch.zeros_like(batch["labels"])} for batch in batches]
    assert together(batches)["labels"].shape == (6, 30)
    assert together(kinds) is None
    same = [{"pixel_values": torch.ones(2, 3, 4, 4), "labels": torch.ones(2)}] * 2
    assert together(same)["pixel_values"].shape == (4, 3, 4, 4)
    assert together([same[0], {**same[1], "flag": True}]) is None


def test_sequences_of_a_padding_free_row_are_its_rows():
    batch = DataCollatorWithFlattening()([{"input_ids": e["input_ids"]} for e in examples()[:4]])
    assert row_lengths(batch) == [9, 30, 14, 22]
    assert can_be_cut(batch)
    part = take(batch, [2, 0])
    assert part["position_ids"].tolist() == [[*range(14), *range(9)]]
    assert part["input_ids"].tolist() == [examples()[2]["input_ids"] + examples()[0]["input_ids"]]
    assert not can_be_cut({**batch, "cu_seq_lens_q": torch.tensor([0, 9, 39, 53, 75])})


def test_what_does_not_fit_is_halved_until_it_is_one_row():
    batches = [pad(examples()[:4])]
    (piece,) = cut(batches, None, LossKind.SUM, shifted=True)
    counts = []
    while (most := finer(piece, LossKind.SUM)) is not None:
        pieces = cut(batches, most, LossKind.SUM, shifted=True)
        counts.append(len(pieces))
        piece = max(pieces, key=lambda p: p.tokens)
    assert counts == sorted(counts)
    assert finer(cut(batches, None, LossKind.WHOLE, shifted=True)[0], LossKind.WHOLE) is None
    assert piece.batch["input_ids"].shape == (1, 30)


def test_a_part_without_a_trained_token_is_left_away():
    batch = pad(examples()[:4])
    batch["labels"][1] = -100
    pieces = cut([batch], 1, LossKind.ITEM_MEAN, shifted=True)
    assert len(pieces) == 3
    assert sum(piece.weight for piece in pieces) == pytest.approx(1)
    batch["labels"][:] = -100
    assert len(cut([batch], 1, LossKind.ITEM_MEAN, shifted=True)) == 4


def test_a_mean_over_rows_that_leaves_one_out_is_not_cut():
    batches = [{**pad(examples()[:4]), "labels": torch.arange(4)} for _ in range(2)]
    assert len(cut(batches, 1, LossKind.ROW_MEAN, shifted=True)) == 8
    batches[1]["labels"][2] = -100
    pieces = cut(batches, 1, LossKind.ROW_MEAN, shifted=True)
    assert [piece.weight for piece in pieces] == [0.25] * 4 + [1]
    assert finer(pieces[-1], LossKind.ROW_MEAN) is None


def test_equal_rows_are_made_unequal_to_tell_the_kinds_apart():
    batch = pad([{"input_ids": list(range(1, 11))}, {"input_ids": list(range(20, 30))}])

    def token_loss(rows):
        return torch.where(rows["labels"][:, 1:] != -100, rows["labels"][:, 1:].float(), torch.nan)

    kinds = {
        LossKind.SUM: lambda rows: float(token_loss(rows).nansum()),
        LossKind.ITEM_MEAN: lambda rows: float(token_loss(rows).nanmean()),
        LossKind.ROW_MEAN: lambda rows: float(token_loss(rows).nanmean(1).mean()),
        LossKind.WHOLE: lambda rows: float(token_loss(rows).nansum() ** 2),
    }
    for kind, loss in kinds.items():
        assert measure_kind(batch, loss, True, 1e-5) is kind
    assert measure_kind(batch, lambda rows: float("nan"), True, 1e-5) is LossKind.WHOLE


def evaluated(trainer, fail=()):
    with FailingAllocations(fail) as counter:
        return trainer.evaluate(examples()[:6]), counter.count


def test_evaluation_shrinks_on_its_own(made):
    expected, _ = evaluated(made(Trainer, per_device_eval_batch_size=6))
    _, count = evaluated(made(AutoFitTrainer, per_device_eval_batch_size=6))
    for number in range(0, count, 5):
        ours = made(AutoFitTrainer, per_device_eval_batch_size=6)
        try:
            found, _ = evaluated(ours, {number})
        except torch.OutOfMemoryError:  # where a batch is fetched
            assert number < 3
            continue
        assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
        assert [event["phase"] for event in ours.recovery.events] == ["eval"]
        assert ours._most_tokens is None
    with pytest.raises(OutOfBudget, match="evaluation does not fit"):
        evaluated(made(AutoFitTrainer, per_device_eval_batch_size=6), range(3, 10_000))


def test_predictions_of_the_parts_are_those_of_the_whole(made):
    expected = made(Trainer, per_device_eval_batch_size=6).predict(examples()[:6])
    ours = made(AutoFitTrainer, per_device_eval_batch_size=6)
    ours._eval_rows = 2
    found = ours.predict(examples()[:6])
    assert found.predictions.shape == expected.predictions.shape
    real = expected.label_ids != -100
    assert torch.allclose(torch.tensor(found.predictions[real]), torch.tensor(expected.predictions[real]), atol=1e-5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"auto_find_batch_size": True}, "does not cover auto_find_batch_size: leave it away"),
        ({"optim": "lomo"}, "does not cover optim lomo"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(made, given, says):
    with pytest.raises(UsageError, match=says):
        made(AutoFitTrainer, **given)


def test_of_several_processes_what_talks_within_a_step_is_refused(tiny_llama):
    def trainer(model, kind="MULTI_CPU", **given):
        arguments = SimpleNamespace(**{"world_size": 2, "torch_compile": False, "save_on_each_node": False, **given})
        return SimpleNamespace(
            args=arguments, model=model, accelerator=SimpleNamespace(distributed_type=SimpleNamespace(value=kind))
        )

    def refused(*asked, **given):
        return [what for what, (found, _) in _refused_of_several(trainer(*asked, **given)).items() if found]

    assert refused(tiny_llama) == []
    assert refused(tiny_llama, "XLA") == ["XLA with 2 processes"]
    assert refused(tiny_llama, torch_compile=True) == ["torch_compile with 2 processes"]
    assert refused(nn.Sequential(nn.SyncBatchNorm(4))) == ["SyncBatchNorm with 2 processes"]
    assert refused(tiny_llama, save_on_each_node=True) == ["save_on_each_node with 2 processes"]


def test_renamed_arguments_are_told_their_new_name(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match="AutoFitTrainer: argument tokenizer has become processing_class"):
        AutoFitTrainer(model=tiny_llama, tokenizer=None)
    with pytest.raises(UsageError, match="argument max_seq_length has become max_length, of SFTConfig"):
        AutoFitSFTTrainer(model=tiny_llama, max_seq_length=8)


def test_a_model_spread_over_devices_is_refused(tiny_llama, tmp_path):
    model = copy.deepcopy(tiny_llama)
    model.hf_device_map = {"model.layers.0": "cpu", "lm_head": "disk"}
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(UsageError, match="spread over cpu, disk"):
        AutoFitTrainer(model=model, args=arguments)


def sft(cls, model, folder, **given):
    values = {
        "output_dir": str(folder / cls.__name__),
        **ARGUMENTS,
        "bf16": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
    }
    arguments = SFTConfig(**{**values, **given})
    peft = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    torch.manual_seed(0)
    return cls(
        model=copy.deepcopy(model),
        args=arguments,
        train_dataset=Dataset.from_list(examples()),
        data_collator=pad,
        peft_config=peft,
        processing_class=byte_tokenizer(),
    )


def test_trl_s_trainer_recovers_too(tiny_llama, tmp_path):
    stock = sft(SFTTrainer, tiny_llama, tmp_path)
    stock.train()
    counter = FailingAllocations()
    undisturbed = sft(AutoFitSFTTrainer, tiny_llama, tmp_path)
    with counter:
        undisturbed.train()
    assert same(weights(stock), weights(undisturbed))
    for number in range(counter.count // 8, counter.count // 2, counter.count // 8):
        ours = sft(AutoFitSFTTrainer, tiny_llama, tmp_path)
        with FailingAllocations({number}):
            ours.train()
        assert same(weights(stock), weights(ours))
        tokens = [[log.get("num_tokens") for log in t.state.log_history] for t in (stock, ours)]
        assert tokens[0] == tokens[1]
        assert len(ours.recovery.events) == 1


def test_trl_s_trainer_goes_on_from_its_checkpoints_and_the_stock_class_from_them(tiny_llama, tmp_path):
    stock = sft(SFTTrainer, tiny_llama, tmp_path, max_steps=4)
    stock.train()
    saved = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    sft(AutoFitSFTTrainer, tiny_llama, tmp_path, **saved).train()
    folder = tmp_path / "AutoFitSFTTrainer"
    assert sorted(path.name for path in folder.glob("*checkpoint*")) == [f"checkpoint-{step}" for step in (2, 3, 4)]
    (folder / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"torn")
    ours = sft(AutoFitSFTTrainer, tiny_llama, tmp_path, **saved)
    ours.train(resume_from_checkpoint=True)
    assert same(weights(stock), weights(ours))
    again = sft(SFTTrainer, tiny_llama, tmp_path, **saved)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert same(weights(stock), weights(again))


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
    ours._eval_rows = 2
    assert ours.evaluate(examples()[:6])["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    ours = made(AutoFitTrainer, **{**given, "compute_loss_func": all_together})
    ours._eval_rows = 2
    with pytest.raises(OutOfBudget, match="takes all rows of a batch together"):
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
    ours._eval_rows = 1
    expected = made(Trainer, **given).evaluate()["eval_loss"]
    assert ours.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_model_patched_by_unsloth_is_refused(made, monkeypatch):
    def forward(self, *args, **kwargs):
        raise NotImplementedError

    forward.__module__ = "unsloth.models.llama"
    monkeypatch.setattr(LlamaAttention, "forward", forward)
    with pytest.raises(UsageError, match="patched by Unsloth: load it with transformers"):
        made(AutoFitTrainer)


def test_a_step_that_cannot_be_cut_says_nothing_about_later_ones(made):
    ours = made(AutoFitTrainer, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=1)
    with FailingAllocations({100, 160}):
        ours.train()
    assert ours._kind is None
