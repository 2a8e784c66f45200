"""Our call of TRL's private preparation must be what a real trainer's constructor does."""

import contextlib

import datasets
import pytest
import transformers
import trl
from transformers import LlamaConfig, LlamaForCausalLM

from autofit.step.tokenizer import byte_tokenizer
from autofit.step.trl_prepare import CHECKED_TRL, prepare_with_trl, quiet_datasets

TURNS = [
    [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Two and two? " * 5},
        {"role": "assistant", "content": "Four"},
    ],
]
SHAPES = {
    "text": [{"text": "one"}, {"text": "two, naïve " * 9}],
    "pairs": [
        {"prompt": "1 + 1 =", "completion": " 2"},
        {"prompt": "", "completion": "from nothing"},
        {"prompt": "p" * 60, "completion": "lost where sequences are cut"},
    ],
    "messages": [{"messages": turns} for turns in TURNS],
    "conversational pairs": [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in TURNS],
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=264, **sizes))


def test_the_installed_trl_is_the_one_this_was_checked_with():
    assert trl.__version__.startswith(CHECKED_TRL + "."), (
        "run the test below, read TRL's changes, then move CHECKED_TRL"
    )


@pytest.mark.parametrize("max_length", [None, 36])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_as_a_real_trainer(shape, max_length, model, tmp_path):
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_length=max_length, use_cpu=True, report_to="none", bf16=False, disable_tqdm=True
    )
    with quiet_datasets():
        trainer = trl.SFTTrainer(
            model, arguments, train_dataset=datasets.Dataset.from_list(SHAPES[shape]), processing_class=byte_tokenizer()
        )
    expected = trainer.train_dataset.select_columns(["input_ids", "labels"]).to_list()

    ours = prepare_with_trl(datasets.Dataset.from_list(SHAPES[shape]), byte_tokenizer(), max_length)

    assert ours.column_names == ["input_ids", "labels"]
    assert ours.to_list() == expected
    assert any(-100 in row["labels"] for row in expected) == ("pairs" in shape)
    if max_length is not None and "pairs" in shape:
        assert len(expected) == len(SHAPES[shape]) - 1, "the one whose prompt alone is longer is not seen to go"


def test_quiet_leaves_everything_as_it_was():
    def state():
        return (
            datasets.are_progress_bars_disabled(),
            datasets.logging.get_verbosity(),
            transformers.logging.get_verbosity(),
        )

    before = state()
    with contextlib.suppress(KeyError), quiet_datasets():
        assert datasets.are_progress_bars_disabled()
        raise KeyError
    assert state() == before


def test_nothing_is_printed(capfd):
    prepare_with_trl(datasets.Dataset.from_list(SHAPES["text"]), byte_tokenizer(), 8)
    assert capfd.readouterr() == ("", "")
