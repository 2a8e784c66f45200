"""Rows out of files: jsonl, json, csv, parquet, folders of them, and what `datasets.save_to_disk` wrote."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from autofit.errors import DataError
from autofit.step.data_access import did_you_mean, first_line
from autofit.step.data_columns import KNOWN_COLUMNS, find_format

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Rows:
    """What one file holds.

    Attributes:
        name: the file, or the hub's data set.
        records: one mapping of columns a row; columns may differ from row to row.
        lines: the line each row starts at, where the file has lines that one can look up; else empty.
    """

    name: str
    records: Sequence[Mapping[str, Any]]
    lines: Sequence[int] = ()

    def where(self, index: int) -> str:
        """`file:line`, or `file, row 7` (rows count from 1)."""
        return f"{self.name}:{self.lines[index]}" if self.lines else f"{self.name}, row {index + 1}"


def read_path(path: Path) -> list[Rows]:
    """The rows of a file or folder, one `Rows` for each file, in the order of their names.

    Raises:
        DataError: missing, unreadable, empty or malformed; says which file and line.
    """
    try:
        if path.is_dir():
            return _read_folder(path)
        if path.is_file():
            return [_read_file(path)]
    except OSError as error:
        raise DataError(f"data {path} cannot be read: {error.strerror or first_line(error)}") from error
    raise DataError(f"data {path} does not exist{did_you_mean(path)}")


def rows_of_dataset(name: str, dataset: datasets.Dataset) -> Rows:
    """The rows of a `datasets.Dataset`, known columns only: others may be images, and are not decoded.

    Raises:
        DataError: the columns are of no known kind.
    """
    find_format(dataset.column_names, name)
    known = [column for column in dataset.column_names if column in KNOWN_COLUMNS]
    return Rows(name, list(dataset.select_columns(known).with_format(None)))


def held_out(folder: Path) -> list[Path]:
    """Files kept for testing, beside a file whose name starts with `train`: they are not trained on."""
    files = _data_files(folder)
    if not any(file.name.startswith("train") for file in files):
        return []
    return [file for file in files if file.name.startswith(("test", "val", "eval", "dev"))]


def _read_folder(folder: Path) -> list[Rows]:
    if (folder / "dataset_dict.json").is_file():
        if not (folder / "train").is_dir():
            splits = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
            raise DataError(f"data {folder} has no train split, only {', '.join(splits)}; give one of these folders")
        return _read_folder(folder / "train")
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        return [_read_saved(folder)]
    aside = held_out(folder)
    files = [file for file in _data_files(folder) if file not in aside]
    if not files:
        raise DataError(f"data folder {folder} has no {', '.join(SUFFIXES)} file and is not a saved data set")
    return [_read_file(file) for file in files]


def _data_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES and file.name[0] not in "._"]


def _read_saved(folder: Path) -> Rows:
    try:
        dataset = datasets.load_from_disk(str(folder))
    except (ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise DataError(f"data {folder} is a broken saved data set: {first_line(error)}") from error
    return rows_of_dataset(str(folder), dataset)


def _read_file(file: Path) -> Rows:
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"data {file}: {file.suffix or 'no suffix'} is not known; valid: {', '.join(SUFFIXES)}")
    if file.stat().st_size == 0:
        raise DataError(f"data {file} is empty (0 bytes)")
    return reader(file)


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}:{line}: not UTF-8 text") from error


def _read_jsonl(file: Path) -> Rows:
    return _parse_jsonl(file, _read_text(file))


def _parse_jsonl(file: Path, text: str) -> Rows:
    records, lines = [], []
    # Not splitlines: JSON strings may hold the other characters that it splits at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}:{number}: not valid JSON: {error.msg} at column {error.colno}") from error
        except RecursionError as error:
            raise DataError(f"{file}:{number}: nested too deeply") from error
        if not isinstance(record, dict):
            raise DataError(f"{file}:{number}: a line must be a JSON object, this one is a {_json_type(record)}")
        records.append(record)
        lines.append(number)
    return Rows(str(file), records, lines)


def _read_json(file: Path) -> Rows:
    text = _read_text(file)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        # Many .json files are one object a line.
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _parse_jsonl(file, text)
        raise DataError(f"{file}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{file}: nested too deeply") from error
    records = content.get("data", [content]) if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise DataError(f'{file}: must be a list of objects or {{"data": [...]}}, not a {_json_type(records)}')
    rows = Rows(str(file), records)
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{rows.where(index)}: must be a JSON object, this one is a {_json_type(record)}")
    return rows


def _read_csv(file: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)
    # Not splitlines, which splits at more than line ends.
    reader = csv.DictReader(io.StringIO(_read_text(file), newline=""), strict=True)
    records: list[Mapping[str, Any]] = []
    lines = []
    line = 1
    try:
        # A row starts on the line after the last one's end.
        line = reader.line_num + 1 if reader.fieldnames else 1
        for record in reader:
            if None in record:
                raise DataError(f"{file}:{line}: more fields than the header has ({len(reader.fieldnames or ())})")
            records.append(record)
            lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}:{line}: not valid CSV: {first_line(error)}") from error
    return Rows(str(file), records, lines)


def _read_parquet(file: Path) -> Rows:
    try:
        return Rows(str(file), pyarrow.parquet.read_table(file).to_pylist())
    except pyarrow.ArrowException as error:
        raise DataError(f"data {file} is not a readable parquet file: {first_line(error)}") from error


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
