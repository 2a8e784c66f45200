"""An estimate, told on a terminal: in short, or as a page that says where the memory goes and why."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from autofit.memory.advice import Advice
from autofit.memory.estimate import Estimate
from autofit.memory.settled import Settled
from autofit.report.words import candidate_words
from autofit.space.candidate import Candidate
from autofit.space.units import format_bytes

# Held to benchmarks/results/estimate_accuracy-h200.json by a test.
ACCURACY = (
    "how far off: on 46 measured rows of Llama-3-8B on an H200, allocated bytes by 0.03 % in the median and at most "
    "0.73 %; reserved bytes by 0.47 % and at most 1.87 %"
)
_BAR = 40
_MOST_NAMES = 6
_TOGETHER = ("buffers", "batch")


@dataclass(frozen=True, kw_only=True)
class Explained:
    """An estimate with what its page needs beside it.

    Attributes:
        targets_used: the adapted layers.
        unquantized: weights that stay as they are though others are quantized: name → bytes.
        advice: changes that would need less.
    """

    settled: Settled
    estimate: Estimate
    targets_used: Sequence[str]
    unquantized: dict[str, int]
    advice: Sequence[Advice]


def print_short(settled: Settled, estimate: Estimate, console: Console) -> None:
    """A few lines: what the device will show, how fast, and what takes the most."""
    parts = sorted(estimate.breakdown_bytes.items(), key=lambda part: -part[1])[:3]
    console.print(_headline(settled))
    console.print(f"peak     {escape(_peak(settled, estimate))}")
    if estimate.tokens_per_second is not None:
        console.print(f"speed    about {estimate.tokens_per_second:,.0f} tokens/s")
    console.print("mostly   " + ", ".join(f"{name} {format_bytes(size)}" for name, size in parts))
    _print_notes(settled, estimate, console)


def print_page(explained: Explained, console: Console) -> None:
    """The whole page; its sizes add up to what the driver will show."""
    settled, estimate = explained.settled, explained.estimate
    console.print(_headline(settled))
    console.print(escape(_why(settled, estimate)))
    console.print()
    for name, size, about in _parts(explained):
        console.print(_bar_line(name, size, estimate.device_bytes))
        for line in about:
            _print_indented(line, console)
    what = "of live tensors" if settled.device.type == "cpu" else "is what nvidia-smi will show"
    console.print(f"[bold]{'together':<16}{format_bytes(estimate.device_bytes):>10}[/] {what}")
    if estimate.paged_bytes:
        console.print(
            f"Beside this, {format_bytes(estimate.paged_bytes)} of optimizer states are in managed memory: "
            "the driver moves them to the host where room is short."
        )
    console.print()
    console.print(f"[bold]The peak:[/] {escape(_peak(settled, estimate))}.")
    if explained.advice:
        console.print()
        console.print("[bold]What would change it most[/]")
        for line in _advice_lines(explained):
            console.print(line, soft_wrap=True)
    console.print()
    _print_notes(settled, estimate, console)
    if settled.device.type == "cuda":
        console.print(f"note     {ACCURACY}")


def grouped(weights: dict[str, int]) -> list[tuple[str, int, int]]:
    """Weights of like layers together: (name with * for each number, how many, bytes), largest first."""
    found: dict[str, tuple[int, int]] = {}
    for name, size in weights.items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        count, total = found.get(pattern, (0, 0))
        found[pattern] = count + 1, total + size
    return sorted(((name, *sums) for name, sums in found.items()), key=lambda group: -group[2])


def _headline(settled: Settled) -> str:
    on = f"[bold]{escape(settled.source.model)}[/] on {escape(settled.device.name)}"
    return f"{on}: {escape(candidate_words(settled.candidate))}"


def _why(settled: Settled, estimate: Estimate) -> str:
    weights = estimate.breakdown_bytes["weights"]
    sixteen = settled.model.weight_bytes_16bit
    parameters = settled.model.num_parameters
    count = f"{parameters / 1e9:.2f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.1f} million"
    return (
        f"In 16 bits its {count} weights are {format_bytes(sixteen)}: the figure that people know. Here they "
        f"take {format_bytes(weights)}, and training with them {format_bytes(estimate.device_bytes)}:"
    )


def _peak(settled: Settled, estimate: Estimate) -> str:
    where = f"in {estimate.peak_phase}"
    if "layer" in where:
        where += f" (of 0 to {settled.model.checkpointable_layers - 1})"
    if settled.device.type == "cpu":
        return f"{format_bytes(estimate.peak_allocated_bytes)} of live tensors, {where}"
    return (
        f"{format_bytes(estimate.device_bytes)} in nvidia-smi ({format_bytes(estimate.peak_reserved_bytes)} reserved, "
        f"{format_bytes(estimate.peak_allocated_bytes)} allocated), {where}; {_room(settled, estimate)}"
    )


def _room(settled: Settled, estimate: Estimate) -> str:
    total = settled.device.total_bytes
    over = estimate.device_bytes - total
    fits = f"{format_bytes(over)} more than" if over > 0 else "fits"
    return f"{fits} the card's {format_bytes(total)}"


def _bar_line(name: str, size: int, total: int) -> str:
    share = size / max(total, 1)
    return f"{name:<16}{format_bytes(size):>10}{share:>6.0%}  [cyan]{'█' * round(_BAR * share)}[/]"


def _print_indented(text: str, console: Console) -> None:
    indent = " " * 4
    lines = textwrap.wrap(text, min(console.width, 100), initial_indent=indent, subsequent_indent=indent)
    console.print(escape("\n".join(lines)), style="dim", soft_wrap=True)


def _parts(explained: Explained) -> Iterator[tuple[str, int, list[str]]]:
    """Name, bytes and explanation of each part of the breakdown that takes anything, in its order."""
    parts = dict(explained.estimate.breakdown_bytes)
    together = sum(parts.pop(name) for name in _TOGETHER)
    about = _abouts(explained)
    for name, size in parts.items():
        if name == "gradients" and together:
            yield "buffers, batch", together, ["what the model keeps beside its weights, and the tokens themselves"]
        if size or name == "gradients":
            lines = list(_unquantized_lines(explained)) if name == "weights" else []
            yield name, size, [about[name], *lines]


def _abouts(explained: Explained) -> dict[str, str]:
    settled, estimate = explained.settled, explained.estimate
    candidate = settled.candidate
    bits = candidate.quantization_bits
    weights = f"frozen, {candidate.dtype}"
    if bits < 16:
        sixteen = format_bytes(settled.model.weight_bytes_16bit)
        weights = f"frozen, in {bits} bits with the statistics to read them back; {sixteen} in 16 bits"
    return {
        "weights": weights,
        "adapters": f"all that is trained: LoRA of rank {candidate.lora_rank} on {', '.join(explained.targets_used)}",
        "gradients": _gradients(estimate),
        "optimizer": "two running averages of each trained weight" + _optimizer(candidate.optimizer),
        "activations": _activations(settled, estimate),
        "logits and loss": _logits(candidate.loss),
        "transient": "alive for a moment: " + ", ".join(_transient(candidate)),
        "workspaces": "what cuBLAS keeps for its products, one for forward and one for backward",
        "allocator slack": "reserved and not in use: PyTorch's allocator rounds up and keeps gaps for later",
        "context": "CUDA itself and its kernels, before a single tensor",
    }


def _transient(candidate: Candidate) -> Iterator[str]:
    if candidate.quantization_bits < 16:
        yield "a weight put back to 16 bits"
    if candidate.checkpointed_layers:
        yield "a checkpointed layer's second forward"
    yield "casts and what backward is at"


def _gradients(estimate: Estimate) -> str:
    if not estimate.breakdown_bytes["gradients"]:
        return "none yet at the peak; in the end as large as the adapters, when activations have gone"
    return "of the adapters only: as large as they are, made layer by layer in backward"


def _optimizer(name: str) -> str:
    eight = ", in 8 bits where that is allowed" if "8bit" in name else ", in 32 bits"
    return f"{eight} ({name})"


def _activations(settled: Settled, estimate: Estimate) -> str:
    """How much of them each token costs: the knob that people have is how many tokens there are."""
    candidate, size = settled.candidate, estimate.breakdown_bytes["activations"]
    tokens, layers = candidate.token_budget, settled.model.checkpointable_layers
    each = f"{format_bytes(size / tokens)} for each of {tokens:,} tokens"
    if layers:
        each += f", {format_bytes(size / tokens / layers)} a token and layer"
    kept = f"; {candidate.checkpointed_layers} layers keep only their input" if candidate.checkpointed_layers else ""
    return f"what forward keeps for backward: {each}{kept}"


def _logits(loss: str) -> str:
    if loss == "chunked":
        return "a score for every word of the vocabulary, for a slice of the tokens at a time"
    return "a score for every word of the vocabulary, for all tokens at once, and copies of that in float32"


def _unquantized_lines(explained: Explained) -> Iterator[str]:
    groups = grouped(explained.unquantized)
    for name, count, size in groups[:_MOST_NAMES]:
        times = f" ({count} of them)" if count > 1 else ""
        yield f"{format_bytes(size)} of that are not quantized: {name}{times}"
    rest = groups[_MOST_NAMES:]
    if rest:
        yield f"{format_bytes(sum(size for _, _, size in rest))} of that are not quantized: {len(rest)} kinds more"


def _advice_lines(explained: Explained) -> Iterator[str]:
    now = explained.estimate
    wide = max((len(change.words) for change in explained.advice), default=0)
    for change in explained.advice:
        then = change.estimate
        less = f"−{format_bytes(now.device_bytes - then.device_bytes)}"
        result = "[bold yellow]changes the result[/]" if change.lossy else "same result"
        line = f"{escape(change.words):<{wide}}{format_bytes(then.device_bytes):>10}{less:>11}"
        yield f"{line}  {result}{_speed(now, then)}"


def _speed(now: Estimate, then: Estimate) -> str:
    if now.tokens_per_second is None or then.tokens_per_second is None:
        return ""
    change = 100 * (then.tokens_per_second / now.tokens_per_second - 1)
    sign = "−" if change < 0 else "+"
    return f", {then.tokens_per_second:,.0f} tokens/s ({sign}{abs(change):.0f} %)"


def _print_notes(settled: Settled, estimate: Estimate, console: Console) -> None:
    for note in (*settled.notes, *value_notes(estimate)):
        console.print(f"note     {escape(note)}")


def value_notes(estimate: Estimate) -> list[str]:
    """What is to be said where the estimate depends on values that nobody has."""
    notes = []
    if estimate.guesses:
        guesses = ", ".join(f"{what} ({count} times)" for what, count in estimate.guesses.items())
        notes.append(f"values that nobody has before training were taken for: {guesses}")
    if estimate.bracket is not None:
        low, high = map(format_bytes, estimate.bracket)
        notes.append(f"depends on values that nobody has before training: allocated bytes are between {low} and {high}")
    return notes
