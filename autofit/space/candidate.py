"""One frozen point of the search space. Two equal candidates need the same bytes, on one model and device."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from autofit.space.cut import whole_blocks

QUANTIZATION_BITS = (16, 8, 4)
OFFLOADING = ("none", "checkpoints", "all")
LOSSES = ("chunked", "full")
STEPS = ("autofit", "sft", "trainer")
STOCK_LOSSES = {"sft": "chunked", "trainer": "full"}
LAYOUTS = ("padded", "packed")
DTYPES = ("bfloat16", "float16", "float32")
OPTIMIZERS = ("adamw_torch", "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit")

LOSSLESS = ("micro_batch_size", "checkpointed_layers", "optimizer", "offload_activations")
LOSSY = ("quantization_bits", "max_seq_length", "lora_rank")
KNOBS = (*LOSSLESS, *LOSSY)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Every knob's value and whatever else decides a step's memory.

    Attributes:
        micro_batch_size: sequences on the device at once.
        max_seq_length: tokens of the longest sequence.
        pace_length: what micro-batches are made for where a few sequences are longer; None where none are.
        tokens_per_micro_batch: padded tokens on the device at once; None means micro_batch_size × pace_length, or ×
            max_seq_length. A sequence of more runs alone: all layers recompute, and what they keep goes to the host.
        checkpointed_layers: how many layers recompute their activations, evenly spread (`is_checkpointed`).
        offload_activations: none, checkpoints (what checkpointed layers keep goes to the host), all.
        quantization_bits: of the base weights; 16 means not quantized (then `dtype` is their type).
        double_quant: whether the statistics of 4-bit weights are quantized too.
        lora_targets: module names, or ("all-linear",).
        layout: of a micro-batch: "padded" rows, or one "packed" row of `token_budget` tokens.
        dtype: of base weights that are not quantized, and what products are computed in.
        accumulates: whether an optimizer step takes more than one micro-batch (kept gradients raise the peak).
        step: whose step runs: "autofit", or "sft" (TRL's SFTTrainer) or "trainer" (transformers' Trainer) as they come.
            Those two have a loss of their own and take whole rows: `micro_batch_size` × `max_seq_length`.
        prepare_kbit: whether PEFT's `prepare_model_for_kbit_training` casts what is not quantized to float32.
    """

    micro_batch_size: int
    max_seq_length: int
    pace_length: int | None = None
    tokens_per_micro_batch: int | None = None
    checkpointed_layers: int = 0
    offload_activations: str = "none"
    quantization_bits: int = 16
    double_quant: bool = True
    lora_rank: int = 16
    lora_targets: tuple[str, ...] = ("all-linear",)
    lora_dropout: float = 0.0
    optimizer: str = "adamw_torch"
    loss: str = "chunked"
    layout: str = "padded"
    attention: str = "sdpa"
    kernels: str = "stock"
    dtype: str = "bfloat16"
    accumulates: bool = False
    step: str = "autofit"
    prepare_kbit: bool = False

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "max_seq_length", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.checkpointed_layers < 0:
            raise ValueError(f"checkpointed_layers must be at least 0, got {self.checkpointed_layers}")
        for name, valid in (
            ("quantization_bits", QUANTIZATION_BITS),
            ("offload_activations", OFFLOADING),
            ("loss", LOSSES),
            ("dtype", DTYPES),
            ("optimizer", OPTIMIZERS),
            ("layout", LAYOUTS),
            ("kernels", ("stock",)),
            ("step", STEPS),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {', '.join(map(str, valid))}, got {getattr(self, name)}")
        # One spelling for what needs the same bytes.
        if self.pace_length is not None and self.pace_length >= self.max_seq_length:
            object.__setattr__(self, "pace_length", None)
        if self.tokens_per_micro_batch == self.micro_batch_size * self._usual_length:
            object.__setattr__(self, "tokens_per_micro_batch", None)
        if self.quantization_bits != 4:
            object.__setattr__(self, "double_quant", False)
        if self.offload_activations == "checkpoints" and self.checkpointed_layers == 0:
            object.__setattr__(self, "offload_activations", "none")
        object.__setattr__(self, "loss", STOCK_LOSSES.get(self.step, self.loss))
        if self.step != "autofit" and (self.tokens_per_micro_batch, self.pace_length) != (None, None):
            raise ValueError(f"tokens_per_micro_batch must be micro_batch_size × max_seq_length with step {self.step}")
        if self.step == "trainer" and self.offload_activations == "all":
            raise ValueError("offload_activations must be none or checkpoints with step trainer; all is TRL's")
        if self.step != "autofit" and self.layout == "packed":
            raise ValueError(f"layout must be padded with step {self.step}")
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))

    @property
    def token_budget(self) -> int:
        """Tokens that a micro-batch may hold: padded ones (rows × longest), or those of a packed row."""
        return whole_blocks(self._asked_tokens) if self.layout == "packed" else self._asked_tokens

    @property
    def _asked_tokens(self) -> int:
        return self.tokens_per_micro_batch or self.micro_batch_size * self._usual_length

    @property
    def _usual_length(self) -> int:
        return self.pace_length or self.max_seq_length

    @property
    def has_long_rows(self) -> bool:
        """Whether a sequence may be too long for a micro-batch, so that it runs alone and otherwise than the rest."""
        return self.max_seq_length > self.token_budget

    def usual(self) -> Candidate:
        """What runs for all sequences but those; the same candidate where there are none."""
        length = min(self._usual_length, self.token_budget)
        return replace(self, max_seq_length=length, pace_length=None, tokens_per_micro_batch=self._asked_tokens)

    def alone(self, layers: int, offloads: bool) -> Candidate:
        """What runs for the longest of those, in a model with so many layers that can be checkpointed.

        Args:
            offloads: whether there is a host that what the layers keep goes to: not on a CPU.
        """
        offload = "checkpoints" if offloads and self.offload_activations != "all" else self.offload_activations
        whole = self.replace(micro_batch_size=1, pace_length=None, tokens_per_micro_batch=None, layout="padded")
        return whole.replace(checkpointed_layers=layers, offload_activations=offload)

    def replace(self, **changes: Any) -> Candidate:
        """A copy with these fields changed. `tokens_per_micro_batch` stays where it is less than the new product."""
        rows = changes.get("micro_batch_size", self.micro_batch_size)
        length = changes.get("max_seq_length", self.max_seq_length)
        length = min(length, changes.get("pace_length", self.pace_length) or length)
        if self.tokens_per_micro_batch is not None and self.tokens_per_micro_batch >= rows * length:
            changes.setdefault("tokens_per_micro_batch", None)
        if changes.get("quantization_bits") == 4 and self.quantization_bits != 4:
            changes.setdefault("double_quant", True)
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """A flat dict of JSON types, `tokens_per_micro_batch` written out; `from_json` is its inverse."""
        return {
            **asdict(self),
            "lora_targets": list(self.lora_targets),
            "tokens_per_micro_batch": self._asked_tokens,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Candidate:
        """The candidate of `to_json`. Keys that are no field of a candidate are left aside."""
        known = {f.name for f in fields(cls)}
        chosen: dict[str, Any] = {k: v for k, v in data.items() if k in known}
        if "lora_targets" in chosen:
            chosen["lora_targets"] = tuple(chosen["lora_targets"])
        return cls(**chosen)


def every_n_layers(checkpointed_layers: int, num_layers: int) -> int | None:
    """With which `every_n_layers` a stock trainer checkpoints so many of its layers; None where no n leaves so many."""
    return next((n for n in range(1, num_layers + 1) if -(-num_layers // n) == checkpointed_layers), None)


def is_checkpointed(layer: int, checkpointed_layers: int, num_layers: int) -> bool:
    """Whether layer 0…num_layers−1 recomputes its activations, when so many layers, evenly spread, do.

    Where num_layers / checkpointed_layers is whole, these are the layers of transformers' `every_n_layers`.
    """
    return layer * checkpointed_layers // num_layers > (layer - 1) * checkpointed_layers // num_layers
