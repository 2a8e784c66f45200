"""The device that a plan is for: the present one, or a card that is only named."""

from __future__ import annotations

from autofit.errors import UsageError
from autofit.space.budget import check_budget_text
from autofit.space.cards import CARDS, CHEAPEST_FIRST, Card, card_of
from autofit.space.facts import DeviceFacts
from autofit.space.units import format_bytes, parse_bytes


def facts_of(card: Card) -> DeviceFacts:
    """A card as the driver would report it."""
    return DeviceFacts(
        type="cuda", name=card.name, total_bytes=card.total_bytes, compute_capability=card.compute_capability
    )


def target_device(gpu_mem: str, present: DeviceFacts) -> tuple[DeviceFacts, tuple[str, ...]]:
    """The device that a plan for `gpu_mem` is about, and notes for the user.

    A card's name is that card, `auto` the present device. A size is part of the present GPU; where there is none, or a
    smaller one, it is part of the smallest known card that has so much.

    Raises:
        UsageError: neither a size, nor `auto`, nor a known card; more than any known card has.
    """
    name = check_budget_text(gpu_mem)
    if name == "auto":
        if present.type != "cuda":
            return present, ("no GPU here: this is a plan for the CPU; --gpu-mem 24GB or rtx-4090 plans for a GPU",)
        return present, ()
    if name in CARDS:
        same = card_of(present.name, present.total_bytes) is CARDS[name]
        return (present if same else facts_of(CARDS[name])), ()
    size = parse_bytes(name)
    if present.type == "cuda" and size <= present.total_bytes:
        return present, ()
    card = next((card for card in CHEAPEST_FIRST if card.total_bytes >= size), None)
    if card is None:
        most = CHEAPEST_FIRST[-1]
        raise UsageError(
            f"gpu-mem {gpu_mem}: no card known here has so much; the largest is {most.name} with "
            f"{format_bytes(most.total_bytes)}"
        )
    why = "no GPU here" if present.type != "cuda" else f"{present.name} has {format_bytes(present.total_bytes)}"
    return facts_of(card), (f"{why}: planned for {card.name}, the smallest known card with {format_bytes(size)}",)
