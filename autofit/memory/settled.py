"""A candidate as it is asked for, settled on its model and on a device that need not be here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autofit.errors import UsageError
from autofit.memory.device import cpu_facts, detect_device
from autofit.space.candidate import Candidate
from autofit.space.cards import CARDS, Card
from autofit.space.facts import DeviceFacts, ModelFacts
from autofit.space.settle import settle
from autofit.space.source import ModelSource
from autofit.step.configs import load_config
from autofit.step.inspect import inspect_model
from autofit.step.model import QUANTIZED_PARAMETERS, add_lora, empty_base, with_placeholders
from autofit.step.policy import default_dtype, resolve_policy
from autofit.step.targets import lora_targets_used

# The card of the published rows: what an estimate is for where no card is named and none is here.
DEFAULT_CARD = "h200"


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What an estimate is of: a candidate, where its model comes from, and the device. `notes` are for the user."""

    candidate: Candidate
    source: ModelSource
    model: ModelFacts
    device: DeviceFacts
    notes: tuple[str, ...]


class Settler:
    """Settles candidates; what a model is made of is looked up once, however many of them it has."""

    def __init__(self, trust_remote_code: bool = False) -> None:
        self._trust_remote_code = trust_remote_code
        self._models: dict[str, ModelFacts] = {}
        self._targets: dict[tuple[str, tuple[str, ...]], list[str]] = {}

    def settle(self, asked: Mapping[str, Any], model: str, device_type: str, card: str | None) -> Settled:
        """The candidate `asked` (see `autofit.space.settle`) on a model and a device.

        Args:
            device_type: "cuda" or "cpu".
            card: one of `CARDS`; None is the GPU that is here, else `DEFAULT_CARD`.

        Raises:
            UsageError, AccessError: no such model or card, or a value that the model or the device rules out.
        """
        device, about = target_device(device_type, card)
        # An estimate reads no weights: real and random ones take the same bytes.
        source = ModelSource(model=model, random_weights=True, trust_remote_code=self._trust_remote_code)
        if model not in self._models:
            self._models[model] = inspect_model(source)
        facts = self._models[model]
        candidate, notes = settle(asked, facts, device, default_dtype(device))
        return Settled(candidate=candidate, source=source, model=facts, device=device, notes=(about, *notes))

    def targets_used(self, settled: Settled) -> list[str]:
        """The adapted layers, by the names with which PEFT would adapt the same again."""
        candidate = settled.candidate
        key = settled.source.model, candidate.lora_targets
        if key not in self._targets:
            # Neither the rank nor what is quantized changes which layers these are.
            plain = candidate.replace(lora_rank=1, quantization_bits=16)
            policy = resolve_policy(plain, settled.device)
            config = load_config(settled.source)
            base = empty_base(config, policy.weight_dtype, policy.attention, settled.source.trust_remote_code)
            self._targets[key] = lora_targets_used(add_lora(base, plain, 1))
        return self._targets[key]


def target_device(device_type: str, card: str | None) -> tuple[DeviceFacts, str]:
    """The device that an estimate is for, and a note that says which and why.

    Raises:
        UsageError: a card beside "cpu", or one that is not known.
    """
    if device_type == "cpu":
        if card is not None:
            raise UsageError(f"card {card} beside device cpu: leave one of them away")
        return cpu_facts(), "estimated for the CPU: what live tensors take there"
    if card is not None:
        return card_facts(known_card(card)), f"estimated for {card}"
    here = detect_device()
    if here.type == "cuda":
        return here, f"estimated for the GPU here, {here.name}"
    default = CARDS[DEFAULT_CARD]
    return card_facts(default), f"estimated for {default.name}: no card was named, and there is no GPU here"


def known_card(name: str) -> Card:
    """The card of that name.

    Raises:
        UsageError: it is none of `CARDS`.
    """
    if name not in CARDS:
        raise UsageError(f"card {name!r} is not known here; known cards: {', '.join(CARDS)}")
    return CARDS[name]


def card_facts(card: Card) -> DeviceFacts:
    """The card as a device."""
    return DeviceFacts(
        type="cuda", name=card.name, total_bytes=card.total_bytes, compute_capability=card.compute_capability
    )


def unquantized_weights(settled: Settled) -> dict[str, int]:
    """Base weights of two or more dimensions that stay as they are though others are quantized: name → bytes.

    Empty where nothing is quantized.
    """
    candidate = settled.candidate
    if candidate.quantization_bits == 16:
        return {}
    # The quantizer only has to put its layers in place, which it does for no device but its own.
    policy = replace(resolve_policy(candidate, settled.device), device="meta")
    config = load_config(settled.source)
    base = empty_base(config, policy.weight_dtype, policy.attention, settled.source.trust_remote_code)
    base.tie_weights()
    with_placeholders(base, candidate, policy)
    return {
        name: weight.numel() * (4 if candidate.prepare_kbit else weight.element_size())
        for name, weight in base.named_parameters()
        if type(weight).__name__ not in QUANTIZED_PARAMETERS and weight.dim() > 1
    }
