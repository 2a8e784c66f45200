"""The one adapter to TRL's data preparation: formats, chat templates, masks and labels are TRL's own code.

`SFTTrainer._prepare_dataset` is private and is called without a trainer, so a test holds its output against a real
trainer's and asserts the version that this was checked with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import datasets
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer

CHECKED_TRL = "1.16"


def prepare_with_trl(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> datasets.Dataset:
    """`input_ids` and `labels` (−100 where not trained) as a default `SFTTrainer` makes them of this data set.

    With prompts and completions only the completion is trained; else everything is. With `max_length`, sequences are
    cut to that many tokens from their start, and those left without a label are dropped.
    """
    trainer = SimpleNamespace(
        _tokenizer=tokenizer,
        completion_only_loss={"prompt", "completion"}.issubset(dataset.column_names),
        chat_template=None,
    )
    arguments = SimpleNamespace(
        max_length=max_length,
        truncation_mode="keep_start",
        dataset_text_field="text",
        dataset_num_proc=None,
        assistant_only_loss=False,
        shuffle_dataset=False,
    )
    with quiet_datasets():
        prepared = SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, arguments, False, None, "train")
    return prepared.select_columns(["input_ids", "labels"])


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars and no warnings from the datasets library inside; as it was afterwards."""
    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
