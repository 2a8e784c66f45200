"""Candidates and what was given up, in words; one wording for terminal, HTML and model card."""

from __future__ import annotations

from typing import Any

from autofit.search.fit_report import FitReport, GivenUp
from autofit.space.candidate import LOSSY, Candidate

_NAMES = {
    "micro_batch_size": "micro-batch",
    "checkpointed_layers": "layers checkpointed",
    "optimizer": "optimizer",
    "offload_activations": "activations offloaded",
    "quantization_bits": "bits",
    "max_seq_length": "sequence length",
    "lora_rank": "LoRA rank",
}


def candidate_words(candidate: Candidate) -> str:
    """`16 × 1,600 tokens, 4 layers checkpointed, 4 bits, rank 16`: what is at its plainest is left unsaid."""
    parts = [f"{size_words(candidate)} tokens"]
    if candidate.has_long_rows:
        parts.append(f"up to {candidate.max_seq_length:,} alone")
    if candidate.checkpointed_layers:
        parts.append(f"{candidate.checkpointed_layers} layers checkpointed")
    if candidate.offload_activations != "none":
        parts.append(f"offloading {candidate.offload_activations}")
    if candidate.optimizer != "adamw_torch":
        parts.append(candidate.optimizer)
    bits = candidate.quantization_bits
    parts.append(f"not quantized ({candidate.dtype})" if bits == 16 else f"{bits} bits")
    parts.append(f"rank {candidate.lora_rank}")
    return ", ".join(parts)


def size_words(candidate: Candidate) -> str:
    """`16 × 1,600`, or of a packed row `packed 4,096 (2 × 2,048)`."""
    size = f"{candidate.micro_batch_size} × {candidate.pace_length or candidate.max_seq_length:,}"
    return f"packed {candidate.token_budget:,} ({size})" if candidate.layout == "packed" else size


def given_up_words(report: FitReport) -> list[str]:
    """One line for each knob that was stepped down: from, to, and what it costs."""
    return [one_given_up(given) for given in report.given_up]


def loss_words(training: dict[str, Any]) -> str:
    """`loss 5.52 → 3.61, evaluation 5.48 → 3.70`, of a training's result; what was not logged is left away."""
    trained = _from_to("loss", training["first_loss"], training["last_loss"]) or "no loss logged"
    evaluated = _from_to("evaluation", training.get("first_eval_loss"), training.get("last_eval_loss"))
    return f"{trained}, {evaluated}" if evaluated else trained


def _from_to(name: str, first: float | None, last: float | None) -> str:
    return "" if first is None or last is None else f"{name} {first:.3f} → {last:.3f}"


def tokens_words(training: dict[str, Any]) -> str:
    """`120,300 tokens, 2.1% of what ran was padding`, of a training's result."""
    real, run = training["tokens"], training["padded_tokens"]
    padding = f"{1 - real / run:.1%} of what ran was padding" if run > real else "no padding"
    return f"{real:,} tokens, {padding}"


def mended_words(training: dict[str, Any]) -> list[str]:
    """One line for each process of a training that died: how, and what the next one did."""
    return [_one_mended(**record) for record in training.get("mended", ())]


def _one_mended(how: str, step: int, from_step: int, changed: dict[str, list[Any]]) -> str:
    steps = [f"{_NAMES[knob]} {before} → {after}" for knob, (before, after) in changed.items()]
    result = "CHANGES THE RESULT" if changed.keys() & set(LOSSY) else "same result"
    return f"{how} after step {step:,}, went on from step {from_step:,}: {', '.join([*steps, result])}"


def one_given_up(given: GivenUp) -> str:
    """One knob: from, to, and what it costs."""
    change = f"{_NAMES[given.knob]} {given.wished} → {given.chosen}"
    return f"{change}: CHANGES THE RESULT, {given.cost}" if given.lossy else f"{change} (same result)"
