"""The parts of recovery: the optimizer's step, evaluation, batches and their cuts, and what is refused."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import DataCollatorWithFlattening
from trl import SFTConfig, SFTTrainer

from autofit.errors import OutOfBudget
from autofit.step.tokenizer import byte_tokenizer
from autofit.training.recovery.cutting import LossKind, cut, finer, measure_kind
from autofit.training.recovery.faults import Record, Watch, retried
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


def test_what_has_a_label_is_no_padding():
    """A script may train on it; and a target may be longer than its source."""
    batch = pad(examples()[:4])
    batch["labels"][0, 20] = 5
    assert row_lengths(batch) == [21, 30, 14, 22]
    assert take(batch, [0, 2])["labels"].shape == (2, 21)
    # Of values that others know, nobody knows where they end.
    assert take({**batch, "tags": batch["labels"]}, [2])["tags"].shape == (1, 30)
    assert take({**batch, "token_type_ids": batch["labels"]}, [2])["labels"].shape == (1, 14)


def test_a_batch_without_names_is_not_cut():
    batch = (torch.ones(4, 3), torch.ones(4))
    (piece,) = cut([batch], 1, LossKind.SUM, shifted=True)
    assert piece.batch is batch
    assert finer(piece, LossKind.SUM) is None
    assert together([batch, batch]) is None


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
    # With what TRL adds for kernels; where that does not belong to the places, nothing is known.
    bounds = torch.tensor([0, 9, 39, 53, 75], dtype=torch.int32)
    order = torch.repeat_interleave(torch.arange(4, dtype=torch.int32), bounds.diff())[None]
    whole = {**batch, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 30, "seq_idx": order}
    assert can_be_cut(whole)
    part = take(whole, [2, 0])
    assert part["cu_seq_lens_q"].tolist() == part["cu_seq_lens_k"].tolist() == [0, 14, 23]
    assert part["cu_seq_lens_q"].dtype is torch.int32
    assert part["max_length_q"] == 14
    assert part["seq_idx"].tolist() == [[0] * 14 + [1] * 9]
    assert not can_be_cut({**whole, "cu_seq_lens_q": bounds[1:]})
    assert not can_be_cut({**whole, "max_length_q": 31})


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


def test_a_step_that_cannot_be_cut_says_nothing_about_later_ones(made):
    ours = made(AutoFitTrainer, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=1)
    with FailingAllocations({100, 160}):
        ours.train()
    assert ours._kind is None
