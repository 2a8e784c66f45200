"""Rows of any known kind become rows of TRL's: `text`, `prompt`/`completion` or `messages`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from autofit.errors import DataError

Row = Mapping[str, Any]
Message = dict[str, str]
Converter = Callable[[Row, str], dict[str, Any] | None]

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Format:
    """One kind of row: the columns that it must have, those it may have, and how it becomes TRL's.

    `convert(row, where)` gives None for a row without text and raises DataError, with where, for a malformed one.
    """

    required: tuple[str, ...]
    convert: Converter
    optional: tuple[str, ...] = ()


def find_format(columns: Iterable[str], name: str) -> Format:
    """The format of a data set that has these columns; what says most about who speaks goes first.

    Raises:
        DataError: none fits; lists the columns and what would be valid.
    """
    present = set(columns)
    for form in FORMATS:
        if present.issuperset(form.required):
            return form
    valid = "; ".join(" + ".join(form.required) for form in FORMATS)
    shown = ", ".join(sorted(map(str, present))) or "none"
    raise DataError(f"data {name} has columns {shown}; valid are: {valid}")


def _convert_text(row: Row, where: str) -> dict[str, Any] | None:
    text = _text(row, "text", where)
    return {"text": text} if text else None


def _convert_pair(row: Row, where: str) -> dict[str, Any] | None:
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        asked, answered = _messages(row, "prompt", where), _messages(row, "completion", where)
        return {"prompt": asked, "completion": answered} if asked and answered else None
    # An empty prompt is one: the completion is then written from nothing.
    prompt = "" if row.get("prompt") == "" else _text(row, "prompt", where)
    completion = _text(row, "completion", where)
    return {"prompt": prompt, "completion": completion} if prompt is not None and completion else None


def _dialogue(column: str) -> Converter:
    def convert(row: Row, where: str) -> dict[str, Any] | None:
        messages = _messages(row, column, where)
        return {"messages": messages} if messages else None

    return convert


def _answer(question: str, answer: str, context: tuple[str, ...] = ()) -> Converter:
    """A question and its answer as a conversation, so that a model's own template is used; the answer is trained."""

    def convert(row: Row, where: str) -> dict[str, Any] | None:
        asked, answered = _text(row, question, where), _text(row, answer, where)
        if not asked or not answered:
            return None
        given = [text for column in context if (text := _text(row, column, where))]
        user = {"role": "user", "content": "\n\n".join([asked, *given])}
        return {"prompt": [user], "completion": [{"role": "assistant", "content": answered}]}

    return convert


# Alpaca has `input`, Dolly calls it `context`.
_CONTEXT = ("input", "context")
FORMATS = (
    Format(("messages",), _dialogue("messages")),
    Format(("conversations",), _dialogue("conversations")),
    Format(("prompt", "completion"), _convert_pair),
    Format(("instruction", "output"), _answer("instruction", "output", _CONTEXT), _CONTEXT),
    Format(("instruction", "response"), _answer("instruction", "response", _CONTEXT), _CONTEXT),
    Format(("question", "answer"), _answer("question", "answer")),
    Format(("text",), _convert_text),
)
KNOWN_COLUMNS = frozenset(column for form in FORMATS for column in (*form.required, *form.optional))


def _text(row: Row, column: str, where: str) -> str | None:
    """A column's text, or None where there is nothing but space."""
    value = row.get(column)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    return _checked(value, column, where) or None


def _checked(value: object, column: str, where: str) -> str:
    """A text, empty where it is blank."""
    if not isinstance(value, str):
        raise DataError(f"{where}: column {column!r} holds a {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: column {column!r} is not valid Unicode: {error.reason}") from error
    return value if value.strip() else ""


def _messages(row: Row, column: str, where: str) -> list[Message] | None:
    """A conversation in role/content form, or None where nobody says anything."""
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: column {column!r} is text, not a list of messages") from error
    if value is None or value == "":
        return None
    if not isinstance(value, list):
        raise DataError(f"{where}: column {column!r} holds a {type(value).__name__}, not a list of messages")
    messages = [_message(message, column, where) for message in value]
    return messages if any(message["content"] for message in messages) else None


def _message(message: object, column: str, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: a message of {column!r} must have role and content (or from and value)")
    spoken = message.get("role") or message.get("from")
    role = _ROLES.get(spoken) if isinstance(spoken, str) else None
    if role is None:
        raise DataError(f"{where}: {column!r}: role {spoken!r} is not known; valid: {', '.join(_ROLES)}")
    if message.get("tool_calls"):
        raise DataError(f"{where}: {column!r}: tool calls are not supported, only text is")
    content = message["content"] if message.get("content") is not None else message.get("value")
    return {"role": role, "content": _content(content, column, where)}


def _content(content: object, column: str, where: str) -> str:
    """A message's text; of a list of parts, theirs."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return _checked(content, column, where)
    parts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
    return "".join(_checked(part, column, f"{where}: only text parts are supported") for part in parts)
