"""The data: found, read, brought into one shape, made into tokens and labels, and cut."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import jinja2
import numpy as np
import pyarrow
from datasets.exceptions import DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

from autofit.errors import DataError
from autofit.space.facts import DataFacts
from autofit.step.batch import IGNORED
from autofit.step.data_access import first_line, hub_error, is_hub_id
from autofit.step.data_columns import find_format
from autofit.step.data_files import Rows, held_out, read_path, rows_of_dataset
from autofit.step.default_data import default_pairs
from autofit.step.tokenizer import ensure_chat_template
from autofit.step.trl_prepare import prepare_with_trl, quiet_datasets

COLUMNS = ["input_ids", "labels"]
_BATCH = 1000


@dataclass(frozen=True)
class RawData:
    """Text in one of TRL's shapes, in memory.

    Attributes:
        dataset: columns `text`, or `prompt` and `completion`, or `messages`; the last two may hold conversations.
        dropped_rows: rows that had no text.
        notes: what the user should know.
    """

    dataset: datasets.Dataset
    dropped_rows: int
    notes: tuple[str, ...]

    @property
    def conversational(self) -> bool:
        """Whether a chat template is needed."""
        first = self.dataset[0]
        return "messages" in first or isinstance(first.get("completion"), list)


@dataclass(frozen=True)
class PreparedData:
    """Token sequences, and what is known about them.

    Attributes:
        dataset: columns `input_ids` and `labels`, lists of ints of the same length; −100 where not trained.
        notes: what the user should know, the raw data's notes included.
    """

    dataset: datasets.Dataset
    facts: DataFacts
    notes: tuple[str, ...]


def load_data(spec: str | None) -> RawData:
    """The data set of a file, a folder or a hub id; the embedded one for None. Columns are found by themselves.

    Raises:
        DataError: missing, malformed or empty, or its columns are of no known kind.
        AccessError: the hub's data set is gated, missing or out of reach.
    """
    if spec is None:
        return RawData(datasets.Dataset.from_list(default_pairs()), 0, ())
    path = Path(spec).expanduser()
    sources = read_path(path) if path.exists() or not is_hub_id(spec) else [_read_hub(spec)]
    aside = held_out(path) if path.is_dir() else []
    notes = (f"not trained on, as they are for testing: {', '.join(file.name for file in aside)}",) if aside else ()
    return _in_one_shape(spec, sources, notes)


def prepare(raw: RawData, tokenizer: PreTrainedTokenizerBase, max_seq_length: int | None = None) -> PreparedData:
    """Tokens and labels, cut to `max_seq_length` tokens from the start; sequences that train nothing are dropped.

    A tokenizer that has no chat template and needs one is given a plain one, in place.

    Raises:
        DataError: nothing is left to train, or the chat template rejects a conversation.
    """
    notes = [*raw.notes, *(ensure_chat_template(tokenizer) if raw.conversational else ())]
    try:
        tokenized = prepare_with_trl(raw.dataset, tokenizer, max_seq_length)
    except jinja2.TemplateError as error:
        raise DataError(f"the tokenizer's chat template rejects a conversation: {first_line(error)}") from error
    dataset = drop_untrained(tokenized, max_seq_length)
    untrained = len(raw.dataset) - len(dataset)
    if untrained:
        cut = f" in their first {max_seq_length} tokens" if max_seq_length else ""
        notes.append(f"{untrained} of {len(raw.dataset)} sequences have nothing to train on{cut}: dropped")
    return PreparedData(dataset, data_facts(dataset, dropped_examples=raw.dropped_rows + untrained), tuple(notes))


def data_facts(dataset: datasets.Dataset, dropped_examples: int = 0) -> DataFacts:
    """The facts of a prepared data set, which must not be empty.

    `trained_tokens` are each sequence's labels other than −100 at positions ≥ 1: what a loss on shifted labels sums
    over. The fingerprint is a function of tokens and labels alone.
    """
    lengths: list[int] = []
    trained: list[int] = []
    hashes = [hashlib.sha256() for _ in range(3)]
    for batch in _batches(dataset):
        lengths.extend(batch.lengths.tolist())
        trained.extend(batch.trained_tokens().tolist())
        for digest, values in zip(hashes, (batch.lengths, batch.input_ids, batch.labels), strict=True):
            digest.update(values.astype("<i8").tobytes())
    return DataFacts(
        num_examples=len(dataset),
        longest=max(lengths),
        lengths=tuple(lengths),
        trained_tokens=tuple(trained),
        dropped_examples=dropped_examples,
        fingerprint=hashlib.sha256(b"".join(digest.digest() for digest in hashes)).hexdigest(),
    )


def truncate(dataset: datasets.Dataset, max_seq_length: int) -> datasets.Dataset:
    """A prepared data set cut to `max_seq_length` tokens from the start, less what then trains nothing.

    Raises:
        DataError: nothing is left to train.
    """
    if all((batch.lengths <= max_seq_length).all() for batch in _batches(dataset)):
        return drop_untrained(dataset, max_seq_length)
    cut = {column: [row[:max_seq_length] for row in dataset[column]] for column in COLUMNS}
    return drop_untrained(datasets.Dataset.from_dict(cut), max_seq_length)


def split_eval(
    dataset: datasets.Dataset, fraction: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """(train, eval): a share of the examples is set aside, at least one; None for a fraction of 0.

    Which ones is a function of the seed and the number of examples; both keep their order.

    Raises:
        DataError: too few examples for both.
    """
    if fraction == 0:
        return dataset, None
    total = len(dataset)
    if total < 2:
        raise DataError(f"eval_fraction {fraction}: {total} example cannot be split into train and eval")
    count = min(max(1, round(total * fraction)), total - 1)
    chosen = set(random.Random(seed).sample(range(total), count))
    train = [index for index in range(total) if index not in chosen]
    return _select(dataset, train), _select(dataset, sorted(chosen))


def drop_untrained(dataset: datasets.Dataset, max_seq_length: int | None = None) -> datasets.Dataset:
    """The sequences with a label to train at a position ≥ 1.

    Raises:
        DataError: there is none.
    """
    kept: list[int] = []
    start = 0
    for batch in _batches(dataset):
        kept.extend((start + np.flatnonzero(batch.trained_tokens())).tolist())
        start += len(batch.lengths)
    if not kept:
        cut = f" in its first {max_seq_length} tokens" if max_seq_length else ""
        raise DataError(f"no sequence has a token to train on{cut}")
    return dataset if len(kept) == len(dataset) else _select(dataset, kept)


@dataclass(frozen=True)
class _Batch:
    """Some sequences end to end: `lengths` [sequences], `input_ids` and `labels` [tokens]."""

    lengths: np.ndarray
    input_ids: np.ndarray
    labels: np.ndarray

    def trained_tokens(self) -> np.ndarray:
        """Labels that a shifted loss sums over, int64 [sequences]."""
        ends = np.cumsum(self.lengths)
        starts = ends - self.lengths
        counts = self.labels != IGNORED
        counts[starts[self.lengths > 0]] = False  # nothing predicts the first token
        total = np.concatenate([[0], np.cumsum(counts)])
        return total[ends] - total[starts]


def _batches(dataset: datasets.Dataset) -> Iterator[_Batch]:
    for table in dataset.with_format("arrow").iter(batch_size=_BATCH):
        ids, labels = (pyarrow.chunked_array(table[column]).combine_chunks() for column in COLUMNS)
        lengths = ids.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        yield _Batch(lengths, ids.flatten().to_numpy(), labels.flatten().to_numpy())


def _select(dataset: datasets.Dataset, indices: list[int]) -> datasets.Dataset:
    return dataset.select(indices, keep_in_memory=True)


def _read_hub(name: str) -> Rows:
    try:
        with quiet_datasets():
            dataset = datasets.load_dataset(name, split="train")
    except (DatasetNotFoundError, OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        access = hub_error("dataset", name, error)
        if access is not None:
            raise access from error
        raise DataError(f"data set {name} on the hub cannot be loaded: {first_line(error)}") from error
    return rows_of_dataset(name, dataset)


def _in_one_shape(name: str, sources: list[Rows], notes: tuple[str, ...]) -> RawData:
    total = sum(len(rows.records) for rows in sources)
    if total == 0:
        raise DataError(f"data {name} has no rows")
    columns = {column for rows in sources for record in rows.records for column in record}
    form = find_format(columns, name)
    converted: list[dict] = []
    for rows in sources:
        for index, record in enumerate(rows.records):
            row = form.convert(record, rows.where(index))
            if row is None:
                continue
            if converted and _kinds(row) != _kinds(converted[0]):
                raise DataError(f"{rows.where(index)}: text where other rows have conversations, or the reverse")
            converted.append(row)
    read = " + ".join(form.required)
    dropped = total - len(converted)
    if not converted:
        raise DataError(f"data {name}: none of its {total} rows has text in {read}")
    if dropped:
        notes = (*notes, f"{dropped} of {total} rows have no text in {read}: dropped")
    return RawData(datasets.Dataset.from_list(converted), dropped, notes)


def _kinds(row: dict) -> tuple[type, ...]:
    return tuple(map(type, row.values()))
