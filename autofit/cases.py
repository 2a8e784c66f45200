"""Candidates as lines of JSON: what `autofit estimate` and `autofit probe` read and write, one line for one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from autofit.config import in_one_line, unknown_key
from autofit.errors import AutofitError, UsageError
from autofit.space.candidate import Candidate
from autofit.space.cards import CARDS

# Added to a case's fields, in this order; None where it is not known.
ANSWERED = (
    "lora_targets_used",
    "note",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "device_bytes",
    "tokens_per_second",
    "breakdown_bytes",
    "bracket",
    "seconds",
)


class Case(BaseModel):
    """One candidate on one model and device, as a user asks for it. `lora_alpha` is twice the rank.

    Fields left None take what model and device suggest (`autofit.space.settle`); the answer says what that was.

    Attributes:
        model: a folder (a config.json is enough) or a name.
        card: the card that an estimate is for; None is the present one, or the H200.
        checkpointed_layers: "all", "none" or how many.
        lora_targets: module names, or ("all-linear",).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1)
    device: Literal["cuda", "cpu"] = "cuda"
    card: str | None = None
    quantization_bits: Literal[16, 8, 4] | None = None
    double_quant: bool = Field(True, strict=True)
    lora_rank: int = Field(16, ge=1, le=2**16, strict=True)
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    lora_targets: tuple[str, ...] = ("all-linear",)
    lora_dropout: float = Field(0.0, ge=0, lt=1, allow_inf_nan=False)
    max_seq_length: int | None = Field(None, ge=2, le=2**24, strict=True)
    micro_batch_size: int = Field(1, ge=1, le=2**16, strict=True)
    checkpointed_layers: int | str = "none"
    offload_activations: Literal["none", "checkpoints", "all"] = "none"
    prepare_kbit: bool = Field(False, strict=True)
    accumulates: bool = Field(False, strict=True)
    optimizer: str = "adamw_torch"
    loss: Literal["chunked", "full"] = "chunked"
    kernels: str = "stock"
    layout: Literal["padded", "packed"] = "padded"
    step: Literal["autofit", "sft", "trainer"] = "autofit"

    @field_validator("card")
    @classmethod
    def _card(cls, value: str | None) -> str | None:
        name = value and value.strip().lower().replace(" ", "-").replace("_", "-")
        if name is not None and name not in CARDS:
            raise UsageError(f"card {value!r} is not known here; known cards: {', '.join(CARDS)}")
        return name

    @field_validator("lora_targets", mode="before")
    @classmethod
    def _targets(cls, value: object) -> tuple[str, ...]:
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, str) and n for n in names):
            raise UsageError(f"lora_targets {value!r}: must be all-linear or a list of module names")
        return tuple(names)

    @field_validator("checkpointed_layers", mode="before")
    @classmethod
    def _layers(cls, value: object) -> int | str:
        if value in ("all", "none") or (type(value) is int and value >= 0):
            return value
        raise UsageError(f"checkpointed_layers {value!r}: must be all, none or a number of layers")

    @model_validator(mode="after")
    def _makes_a_candidate(self) -> Case:
        counted = self.checkpointed_layers if isinstance(self.checkpointed_layers, int) else 0
        known = {**self.asked, "max_seq_length": self.max_seq_length or 1, "checkpointed_layers": counted}
        try:
            Candidate(**{name: value for name, value in known.items() if value is not None})
        except ValueError as error:
            raise UsageError(str(error)) from error
        return self

    @property
    def asked(self) -> dict[str, Any]:
        """The fields that are a candidate's, as `autofit.space.settle.settle` takes them."""
        return {name: getattr(self, name) for name in type(self).model_fields if name not in _NOT_A_CANDIDATES}

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types, `lora_targets` "all-linear" or a list."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        targets = "all-linear" if self.lora_targets == ("all-linear",) else list(self.lora_targets)
        return {**values, "lora_targets": targets}


_NOT_A_CANDIDATES = ("model", "device", "card")

# What is known of a case: some of `ANSWERED`, fields of the case as they were settled, perhaps `error`.
Measure = Callable[[Case], dict[str, Any]]


def make_case(values: Mapping[str, Any]) -> Case:
    """The case of these fields.

    Raises:
        UsageError: a field that is unknown, missing or out of range; says which, and what would be valid.
    """
    unknown = unknown_key(values, Case.model_fields)
    if unknown is not None:
        raise UsageError(unknown)
    try:
        return Case(**values)
    except ValidationError as error:
        raise UsageError(in_one_line(error)) from error


def parse_case(line: bytes) -> Case:
    """The case of one line of JSON.

    Raises:
        UsageError: no JSON object, or as `make_case`.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not a line of JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError('a case is a JSON object, like {"model": "llama-3-8b", "max_seq_length": 2048}')
    return make_case(values)


def answer(case: Case, measure: Measure) -> dict[str, Any]:
    """The case's fields as they were settled, then `ANSWERED`, then `error` where there was one.

    Raises:
        AutofitError: what `measure` raises.
    """
    found = measure(case)
    settled = {name: found.get(name, value) for name, value in case.to_json().items()}
    error = {"error": found["error"]} if found.get("error") else {}
    return {**settled, **{name: found.get(name) for name in ANSWERED}, **error}


def answer_lines(lines: Iterable[bytes], measure: Measure) -> Iterator[dict[str, Any]]:
    """One answer for each line that is not blank, in order; a line that fails has `error`, and the rest go on.

    A line that is no case at all is answered by its number: {"line": 3, "error": "…"}.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            case = parse_case(line)
        except UsageError as error:
            yield {"line": number, "error": str(error)}
            continue
        try:
            yield answer(case, measure)
        except Exception as error:
            # Architectures fail in ways that nobody can foresee; the other lines are no worse for it.
            text = " ".join(str(error).split())
            message = text if isinstance(error, AutofitError) else f"{type(error).__name__}: {text}"
            yield {**case.to_json(), **dict.fromkeys(ANSWERED), "error": message}
