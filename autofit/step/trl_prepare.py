"""The one adapter to TRL's data preparation: formats, chat templates, masks and labels are TRL's own code.

`SFTTrainer._prepare_dataset` is private and is called without a trainer, so a test holds its output against a real
trainer's and asserts the version that this was checked with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import datasets
import transformers
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
    trainer: Any = SimpleNamespace(
        _tokenizer=tokenizer,
        completion_only_loss={"prompt", "completion"}.issubset(dataset.column_names),
        chat_template=None,
    )
    arguments: Any = SimpleNamespace(
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
    """No progress bars of datasets and no warnings inside; as it was afterwards.

    Among them is transformers' warning of a sequence beyond the model's positions: it will be cut.
    """
    bars = datasets.are_progress_bars_disabled()
    loggers = (datasets.logging, transformers.logging)
    verbosities = [logger.get_verbosity() for logger in loggers]
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.set_verbosity_error()
    try:
        yield
    finally:
        for logger, verbosity in zip(loggers, verbosities, strict=True):
            logger.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
