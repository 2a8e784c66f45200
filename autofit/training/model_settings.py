"""What a script asks of a model that is loaded by its name (`SFTConfig(model_init_kwargs=…)`): honoured, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, TrainingArguments

from autofit.errors import UsageError
from autofit.space.candidate import DTYPES, Candidate
from autofit.space.source import ModelSource
from autofit.step.configs import load_config
from autofit.step.model import quantization_config

_ATTENTION = ("sdpa", "eager")
# One device, as the trainer's own is; "auto" is that where there is one.
_ONE_DEVICE = (None, "auto", "cuda", "cuda:0", 0)
# Neither changes what a training step computes: TRL's sets use_cache itself.
_HARMLESS = ("use_cache", "low_cpu_mem_usage")
_HONOURED = ("attn_implementation", "dtype", "quantization_config", "trust_remote_code", "device_map")
# Of bitsandbytes' settings, those that have no say.
_OF_OTHER_BITS = {4: ("llm_int8_threshold", "llm_int8_has_fp16_weight"), 8: ("bnb_4bit_",)}
_INSTEAD = "load the model yourself and give it instead of its name"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What the script sets; None where it does not.

    Attributes:
        dtype: of weights that are not quantized.
        double_quant: of 4 bits.
    """

    attention: str | None
    dtype: str
    bits: int | None
    double_quant: bool
    trust_remote_code: bool


def model_settings(model: str, args: TrainingArguments) -> ModelSettings:
    """Of the arguments of a script whose model is a folder or a hub id.

    Raises:
        UsageError: something that can't be honoured in what is tried and in what is loaded; names it.
        AccessError: as `load_config`, which says what dtype "auto" is.
    """
    given = dict(getattr(args, "model_init_kwargs", None) or {})
    computes = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    trusts = bool(given.get("trust_remote_code", getattr(args, "trust_remote_code", False)))
    for name, value in given.items():
        neutral = name in _HARMLESS or (name == "revision" and value in (None, "main"))
        if not neutral and name not in _HONOURED:
            valid = ", ".join((*_HONOURED, *_HARMLESS))
            raise UsageError(f"fit: model_init_kwargs {name} is not covered; valid: {valid}; or {_INSTEAD}")
    attention = given.get("attn_implementation")
    if attention not in (None, *_ATTENTION):
        raise _refused(f"attn_implementation {attention}", ", ".join(_ATTENTION))
    _check_device(given.get("device_map"), args)
    dtype = _dtype(given["dtype"], model, trusts) if "dtype" in given else computes
    if dtype != computes != "float32":
        raise _refused(f"dtype {dtype} with {computes} products", f"{computes}, or neither bf16 nor fp16")
    bits, double_quant = _quantization(given.get("quantization_config"), dtype)
    return ModelSettings(
        attention=attention, dtype=dtype, bits=bits, double_quant=double_quant, trust_remote_code=trusts
    )


def _refused(what: str, valid: str) -> UsageError:
    return UsageError(f"fit: model_init_kwargs {what} cannot be estimated; valid: {valid}; or {_INSTEAD}")


def _check_device(device_map: Any, args: TrainingArguments) -> None:
    one = (*_ONE_DEVICE, "cpu") if args.use_cpu else _ONE_DEVICE
    device = device_map.get("") if isinstance(device_map, Mapping) and set(device_map) == {""} else device_map
    if isinstance(device, Mapping) or str(device) not in map(str, one):
        raise _refused(f"device_map {device_map}", 'one device, as {"": 0}')


def _dtype(asked: Any, model: str, trusts: bool) -> str:
    found = asked
    if asked == "auto":
        found = load_config(ModelSource(model=model, trust_remote_code=trusts)).dtype
    name = str(found).removeprefix("torch.")
    if name not in DTYPES:
        raise _refused(f"dtype {asked}", ", ".join(DTYPES))
    return name


def _quantization(settings: Any, dtype: str) -> tuple[int | None, bool]:
    """Bits, and whether 4-bit weights' statistics are quantized; whatever else is set must be as a run has it."""
    if settings is None:
        return None, True
    if not isinstance(settings, BitsAndBytesConfig):
        raise _refused(f"quantization_config of {type(settings).__name__}", "BitsAndBytesConfig")
    bits = 4 if settings.load_in_4bit else 8 if settings.load_in_8bit else 16
    double_quant = bool(settings.bnb_4bit_use_double_quant)
    like = Candidate(
        micro_batch_size=1, max_seq_length=1, quantization_bits=bits, double_quant=double_quant, dtype=dtype
    )
    ours = quantization_config(like, PreTrainedConfig())
    if ours is None:
        return bits, True
    expected = ours.to_dict()
    for name, value in settings.to_dict().items():
        if value != expected[name] and not name.startswith(_OF_OTHER_BITS[bits]):
            raise _refused(f"quantization_config {name}={value}", f"{name}={_shown(expected[name])}")
    return bits, double_quant


def _shown(value: Any) -> str:
    return f"torch.{value}" if isinstance(getattr(torch, str(value), None), torch.dtype) else repr(value)
