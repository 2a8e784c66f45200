"""What is known about the model, the data and the device before anything is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from autofit.space.cut import whole_blocks

T = TypeVar("T", bound="_Facts")

# Few sequences set the pace of all others where they are so many times as long.
_MUCH_LONGER = 1.5


@dataclass(frozen=True, kw_only=True)
class _Facts:
    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; `from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls: type[T], data: dict[str, Any]) -> T:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


@dataclass(frozen=True, kw_only=True)
class ModelFacts(_Facts):
    """An architecture, as its config says it.

    `weight_bytes_16bit` are the base weights at two bytes each; `download_bytes` what fetching them takes (0 where
    they are on disk or random); `quantized_bits` is set where the checkpoint is already quantized;
    `checkpointable_layers` counts the layers that transformers can checkpoint (0 where it cannot);
    `chunked_loss` says whether the chunked loss can be right for it; `packed_head_size` is the size of its attention
    heads where sequences can share a row, else None.
    """

    architecture: str
    num_parameters: int
    weight_bytes_16bit: int
    checkpointable_layers: int
    max_positions: int | None
    attention: str = "sdpa"
    chunked_loss: bool = True
    packed_head_size: int | None = None
    quantized_bits: int | None = None
    download_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class DataFacts(_Facts):
    """A prepared data set. `lengths` are tokens of each sequence, `trained_tokens` the labels that count in each."""

    num_examples: int
    longest: int
    lengths: tuple[int, ...]
    trained_tokens: tuple[int, ...]
    dropped_examples: int = 0
    fingerprint: str = ""

    @classmethod
    def of_equal(cls, count: int, length: int) -> DataFacts:
        """So many sequences of so many tokens, all trained."""
        return cls(num_examples=count, longest=length, lengths=(length,) * count, trained_tokens=(length,) * count)

    def pace_length(self, max_seq_length: int) -> int | None:
        """A length, in whole blocks, that all sequences but one in a hundred have at most.

        None where the longest, cut to `max_seq_length`, is not much longer: they run slower alone.
        """
        if not self.lengths:
            return None
        usual = whole_blocks(sorted(self.lengths)[(99 * len(self.lengths) - 1) // 100])
        return usual if min(self.longest, max_seq_length) >= _MUCH_LONGER * usual else None

    def truncation_cost(self, max_seq_length: int) -> tuple[int, float]:
        """What cutting sequences to `max_seq_length` tokens deletes: (examples cut, share of trained tokens lost).

        The share is 0…1. Exact where the trained tokens are each sequence's tail, as all that `prepare` makes are.
        """
        sequences = zip(self.lengths, self.trained_tokens, strict=True)
        cut = [(length - max_seq_length, trained) for length, trained in sequences if length > max_seq_length]
        lost = sum(min(excess, trained) for excess, trained in cut)
        return len(cut), lost / max(sum(self.trained_tokens), 1)


@dataclass(frozen=True, kw_only=True)
class DeviceFacts(_Facts):
    """The device that a run targets. `total_bytes` as the driver reports it (host memory for `cpu`)."""

    type: str
    name: str
    total_bytes: int
    compute_capability: tuple[int, int] | None = None

    @property
    def bf16(self) -> bool:
        """Whether matrix products in bfloat16 run at full speed (compute capability ≥ 8.0)."""
        return self.compute_capability is not None and self.compute_capability >= (8, 0)

    @property
    def widest_varlen_head(self) -> int:
        """The largest head size whose variable-length flash attention can be trained; 0 where there is none."""
        capability = self.compute_capability
        return 0 if capability is None or capability < (8, 0) else 192 if has_narrow_flash(capability) else 256


def can_pack(model: ModelFacts, device: DeviceFacts, dtype: str) -> bool:
    """Whether the attention of a model, computed in this type, can keep sequences in a row apart on a GPU."""
    return dtype != "float32" and 0 < (model.packed_head_size or 0) <= device.widest_varlen_head


def has_narrow_flash(capability: tuple[int, int]) -> bool:
    """Whether flash attention's backward kernels stop at heads of 192, for want of shared memory."""
    return capability in ((8, 6), (8, 9)) or capability[0] == 12
