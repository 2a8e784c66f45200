"""The ladder: the order in which knobs are given up, and the candidates that order passes through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from autofit.errors import UsageError
from autofit.space.candidate import KNOBS, LOSSY, Candidate

# Short names for --order, and the knob each moves. The default order is this one: 4 bits is what QLoRA is,
# offloading is slow over a narrow bus, a shorter sequence deletes answers.
RUNGS = {
    "batch": "micro_batch_size",
    "checkpointing": "checkpointed_layers",
    "paging": "optimizer",
    "bits": "quantization_bits",
    "offloading": "offload_activations",
    "seq": "max_seq_length",
    "rank": "lora_rank",
}
DEFAULT_ORDER = tuple(RUNGS)
# Of a stock trainer's layers every n-th may be checkpointed.
_EVERY = (1, 2, 3, 4, 8)
SHORTEST_SEQUENCE = 64
LOWEST_RANK = 4
MINIMA = {"micro_batch_size": 1, "max_seq_length": SHORTEST_SEQUENCE, "quantization_bits": 4, "lora_rank": LOWEST_RANK}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What bounds the ladder besides the wish.

    Attributes:
        global_batch_size: sequences an optimizer step.
        checkpointable_layers: 0 where the model cannot checkpoint.
        can_page: whether there is host memory to page optimizer states and activations to.
        can_quantize: whether the base may be quantized further than the wish.
        double_quant: whether 4-bit statistics are quantized too.
        pins: knobs that are never touched.
        minima: values that are never gone below, by knob (for `checkpointed_layers` it has no meaning).
        allow: the lossy knobs that may move.
        stock: whether a stock trainer runs it: micro-batches of equal size, and every n-th layer checkpointed.
    """

    global_batch_size: int
    checkpointable_layers: int
    can_page: bool
    can_quantize: bool = True
    double_quant: bool = True
    pins: frozenset[str] = frozenset()
    minima: Mapping[str, int] = field(default_factory=dict)
    allow: frozenset[str] = frozenset(LOSSY)
    stock: bool = False


def parse_order(text: str) -> tuple[str, ...]:
    """`batch,seq,bits` as rung names. A knob that is not named stays as wished.

    Raises:
        UsageError: an unknown or a doubled name.
    """
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    by_knob = {knob: name for name, knob in RUNGS.items()}
    names = tuple(by_knob.get(name, name) for name in names)
    unknown = [name for name in names if name not in RUNGS]
    if unknown or not names or len(set(names)) != len(names):
        what = f"{unknown[0]!r} is not a knob" if unknown else "each knob must be named once"
        raise UsageError(f"order {text!r}: {what}; valid: {','.join(RUNGS)}")
    return names


def knob_values(knob: str, wish: Candidate, limits: Limits) -> list[int | str]:
    """The values a knob steps down through, the wished one first. One value: the knob cannot move."""
    current: int | str = getattr(wish, knob)
    if knob in limits.pins or (knob in LOSSY and knob not in limits.allow):
        return [current]
    values = [current, *_steps_down(knob, wish, limits)]
    least = max(MINIMA.get(knob, 0), limits.minima.get(knob, 0))
    return [v for v in values if v == current or isinstance(v, str) or v >= least]


def _steps_down(knob: str, wish: Candidate, limits: Limits) -> list[int | str]:
    if knob == "micro_batch_size":
        # Only what changes how many micro-batches a global batch takes.
        batch = limits.global_batch_size
        rows = {-(-batch // k) for k in range(1, batch + 1) if not limits.stock or batch % k == 0}
        return sorted((r for r in rows if r < wish.micro_batch_size), reverse=True)
    if knob == "checkpointed_layers":
        layers = limits.checkpointable_layers
        counts = {layers // 4, layers // 2, 3 * layers // 4, layers}
        if limits.stock:
            counts = {-(-layers // every) for every in _EVERY}
        return [n for n in sorted(counts) if n > wish.checkpointed_layers]
    if knob == "optimizer":
        paged = {"adamw_torch": "paged_adamw_32bit", "adamw_8bit": "paged_adamw_8bit"}
        return [paged[wish.optimizer]] if limits.can_page and wish.optimizer in paged else []
    if knob == "quantization_bits":
        return [b for b in (8, 4) if b < wish.quantization_bits] if limits.can_quantize else []
    if knob == "offload_activations":
        levels = ["none", "checkpoints", "all"]
        return list(levels[levels.index(wish.offload_activations) + 1 :]) if limits.can_page else []
    if knob == "max_seq_length":
        return list(_shorter(wish.max_seq_length))
    if knob == "lora_rank":
        return [wish.lora_rank >> k for k in range(1, 12) if wish.lora_rank >> k >= 1]
    raise KeyError(knob)


def _shorter(length: int) -> Iterator[int]:
    """¾, ½, ⅜, ¼, … of a length, in whole multiples of 8, down to the shortest."""
    last, eighths = length, length
    while eighths > 1:
        for part in (3 * eighths // 4, eighths // 2):
            rounded = part // 8 * 8
            if 0 < rounded < last:
                yield rounded
                last = rounded
        eighths //= 2


def with_knob(candidate: Candidate, knob: str, value: int | str, limits: Limits) -> Candidate:
    """The candidate with one knob moved."""
    changes: dict[str, int | str | bool] = {knob: value}
    if knob == "quantization_bits" and value == 4:
        changes["double_quant"] = limits.double_quant
    return candidate.replace(**changes)


def ladder(wish: Candidate, limits: Limits, order: tuple[str, ...] = DEFAULT_ORDER) -> tuple[Candidate, ...]:
    """The chain of candidates from the wish down: each knob is spent before the next is touched.

    Nothing says that a later one needs less: bits, for one, are not monotone.
    """
    chain = [wish]
    for name in order:
        knob = RUNGS[name]
        for value in knob_values(knob, wish, limits)[1:]:
            lower = with_knob(chain[-1], knob, value, limits)
            if lower not in chain:
                chain.append(lower)
    return tuple(chain)


def check_knob(name: str) -> str:
    """The knob's full name for a full or short one.

    Raises:
        UsageError: no knob is called so.
    """
    knob = RUNGS.get(name, name)
    if knob not in KNOBS:
        raise UsageError(f"{name!r} is not a knob; valid: {', '.join(KNOBS)}")
    return knob
