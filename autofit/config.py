"""What a user asks for: flags and a YAML file become one `RunConfig`."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from autofit.errors import UsageError
from autofit.space.budget import check_budget_text
from autofit.space.candidate import KNOBS, LOSSY
from autofit.space.ladder import DEFAULT_ORDER, MINIMA, check_knob, parse_order

# What 2 cores train visibly in well under a minute; used where neither model nor data is given.
EMBEDDED_PRESET: dict[str, Any] = {"max_steps": 20, "learning_rate": 1e-2, "warmup_steps": 2}


class RunConfig(BaseModel):
    """One run. Knobs that are set are where the search starts; `pin` keeps them there.

    A knob left None takes the default wish (`autofit.space.wish`). Sizes of `gpu_mem` are texts like 24GB.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    data: str | None = None
    gpu_mem: str = "auto"
    output_dir: str | None = None
    random_weights: bool = False
    trust_remote_code: bool = False

    micro_batch_size: int | None = Field(None, ge=1, le=2**16, strict=True)
    tokens_per_micro_batch: int | None = Field(None, ge=1, strict=True)
    max_seq_length: int | None = Field(None, ge=8, le=2**24, strict=True)
    checkpointed_layers: int | None = Field(None, ge=0, strict=True)
    offload_activations: Literal["none", "checkpoints", "all"] | None = None
    quantization_bits: Literal[16, 8, 4] | None = None
    double_quant: bool = True
    lora_rank: int = Field(16, ge=1, le=2**16, strict=True)
    lora_alpha: int = Field(32, ge=1, le=2**20, strict=True)
    lora_targets: tuple[str, ...] = ("all-linear",)
    lora_dropout: float = Field(0.0, ge=0, lt=1, allow_inf_nan=False)
    optimizer: Literal["adamw_torch", "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit"] | None = None
    loss: Literal["chunked", "full"] = "chunked"
    dtype: Literal["bfloat16", "float16", "float32"] | None = None

    search: Literal["plan", "measure"] = "plan"
    order: tuple[str, ...] = DEFAULT_ORDER
    pin: dict[str, Any] = Field(default_factory=dict)
    min: dict[str, int] = Field(default_factory=dict)
    allow: tuple[str, ...] = LOSSY
    trial_timeout: float = Field(600.0, gt=0, allow_inf_nan=False)

    global_batch_size: int = Field(16, ge=1, le=2**16, strict=True)
    num_train_epochs: float = Field(1.0, gt=0, allow_inf_nan=False)
    max_steps: int | None = Field(None, ge=1, strict=True)
    learning_rate: float = Field(2e-4, gt=0, allow_inf_nan=False)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: int = Field(0, ge=0, strict=True)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(1.0, ge=0, allow_inf_nan=False)
    save_steps: int = Field(200, ge=1, strict=True)
    eval_fraction: float = Field(0.0, ge=0, lt=1, allow_inf_nan=False)
    seed: int = Field(42, ge=0, le=2**32 - 1, strict=True)

    @field_validator("gpu_mem", mode="before")
    @classmethod
    def _budget(cls, value: object) -> str:
        return check_budget_text(str(value))

    @field_validator("order", mode="before")
    @classmethod
    def _order(cls, value: object) -> tuple[str, ...]:
        return parse_order(value if isinstance(value, str) else ",".join(map(str, _listed(value))))

    @field_validator("lora_targets", mode="before")
    @classmethod
    def _targets(cls, value: object) -> tuple[str, ...]:
        return tuple(map(str, _listed(value)))

    @field_validator("model", "data", "output_dir")
    @classmethod
    def _named(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and not value.strip():  # a shell's unset variable; as a path it would be this folder
            raise UsageError(f"{info.field_name} is empty; give a name or a path, or leave it away")
        return value

    @field_validator("pin", "min", mode="before")
    @classmethod
    def _knobs(cls, value: object) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise UsageError(f"{value!r} must be knob: value pairs")
        return {check_knob(str(name)): v for name, v in value.items()}

    @field_validator("min")
    @classmethod
    def _have_minima(cls, value: dict[str, int]) -> dict[str, int]:
        for knob in value:
            if knob not in MINIMA:
                raise UsageError(f"min {knob}: it has no minimum; valid: {', '.join(MINIMA)}")
        return value

    @field_validator("allow", mode="before")
    @classmethod
    def _allowed(cls, value: object) -> tuple[str, ...]:
        knobs = tuple(check_knob(str(name)) for name in _listed(value) if name != "none")
        for knob in knobs:
            if knob not in LOSSY:
                raise UsageError(f"allow {knob}: it changes no result and needs no consent; valid: {', '.join(LOSSY)}")
        return knobs

    @model_validator(mode="after")
    def _pins_win(self) -> RunConfig:
        below = [k for k, least in self.min.items() if isinstance(self.pin.get(k), int) and self.pin[k] < least]
        if below:
            raise UsageError(f"pin {below[0]}={self.pin[below[0]]} is below min {below[0]}={self.min[below[0]]}")
        return self

    @property
    def embedded(self) -> bool:
        """Whether the run uses the small model made on the spot."""
        return self.model is None

    @property
    def asked(self) -> dict[str, Any]:
        """The candidate's fields as the user set them."""
        names = (*KNOBS, "tokens_per_micro_batch", "double_quant", "lora_targets", "lora_dropout", "loss", "dtype")
        return {name: getattr(self, name) for name in names}


def load_run_config(path: str | None, flags: Mapping[str, Any]) -> RunConfig:
    """The config of a YAML file (or none) with flags on top; flags that are None were not given.

    Raises:
        UsageError: unreadable file, unknown key, or a value out of range; says which, and the nearest valid name.
    """
    values = {} if path is None else _read_yaml(path)
    for name, value in flags.items():
        if value is None:
            continue
        given = values.get(name)
        values[name] = {**given, **value} if isinstance(value, Mapping) and isinstance(given, Mapping) else value
    if values.get("model") is None and values.get("data") is None:
        values = {**EMBEDDED_PRESET, **values}
    where = f"{path}: " if path else ""
    unknown = unknown_key(values, RunConfig.model_fields)
    if unknown is not None:
        raise UsageError(where + unknown)
    pins = _checked_pins(values.get("pin"))
    try:
        return RunConfig(**{**values, **pins})
    except ValidationError as error:
        raise UsageError(where + in_one_line(error)) from error


def _checked_pins(pins: object) -> dict[str, Any]:
    """A pin is a wish that stays: it is validated and set like any other value."""
    return {check_knob(str(name)): value for name, value in pins.items()} if isinstance(pins, Mapping) else {}


def _read_yaml(path: str) -> dict[str, Any]:
    file = Path(path)
    if not path.strip():
        raise UsageError("the config file's name is empty; give one, or leave it away")
    if file.is_dir():
        raise UsageError(f"config file {path} is a folder; a model's goes to --model, data to --data")
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.y*ml")], n=1)
        raise UsageError(
            f"config file {path} does not exist" + (f"; did you mean {file.parent / near[0]}?" if near else "")
        )
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"config file {path} must hold key: value pairs")
    # `key:` with nothing behind it is a key that was not given.
    return {str(key).replace("-", "_"): value for key, value in values.items() if value is not None}


def _listed(value: object) -> list[Any]:
    if value is False:  # YAML's reading of `no`
        return []
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, (list, tuple)):
        return list(value)
    raise UsageError(f"{value!r} must be a list")


def unknown_key(values: Collection[str], valid: Collection[str]) -> str | None:
    """What to say of the first key that is not valid; None where all are."""
    unknown = next((key for key in values if key not in valid), None)
    if unknown is None:
        return None
    near = difflib.get_close_matches(unknown, valid, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
    return f"unknown key {_shown(unknown)}; {hint}"


def in_one_line(error: ValidationError) -> str:
    """The first thing that is wrong: which field, its value, and what would be valid."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"])) or "config"
    return f"{name} {_shown(first.get('input'))}: {first['msg']}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:199] + "…"
