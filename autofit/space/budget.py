"""What the device may use. CUDA context included; on a CPU the budget counts live tensors."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from autofit.errors import UsageError
from autofit.space.cards import CARDS
from autofit.space.facts import DeviceFacts
from autofit.space.units import MIB, format_bytes, parse_bytes


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """What the device may use.

    Attributes:
        total_bytes: context included; a trial's largest peak, as the driver sees it, is held against this.
        headroom_bytes: what of it is left alone (2 %, at least 256 MiB; 0 on a CPU).
        clamped_from_bytes: what was asked for, where the card is smaller than that.
    """

    total_bytes: int
    headroom_bytes: int = 0
    clamped_from_bytes: int | None = None

    @property
    def usable_bytes(self) -> int:
        """What a process is capped to, context included: the budget less headroom."""
        return self.total_bytes - self.headroom_bytes


def requested_bytes(text: str, device: DeviceFacts) -> int:
    """Bytes for a size, a card's name or `auto` (all the device has).

    Raises:
        UsageError: neither a size nor a known card.
    """
    name = check_budget_text(text)
    if name == "auto":
        return device.total_bytes
    return CARDS[name].total_bytes if name in CARDS else parse_bytes(name)


def check_budget_text(text: str) -> str:
    """The text as `requested_bytes` reads it, checked without knowing the device.

    Raises:
        UsageError: neither a size, nor `auto`, nor a known card.
    """
    if not isinstance(text, str):  # a script's: 24 may be meant as gigabytes, or as bytes
        raise UsageError(f"gpu-mem {text!r} is no text; write it like '24GB', '24GiB' or '123456B'")
    name = text.strip().lower().replace(" ", "-").replace("_", "-")
    if name == "auto" or name in CARDS:
        return name
    if name[:1].isdigit() or name[:1] in ("-", "+", "."):
        try:
            parse_bytes(text)
        except UsageError as error:
            raise UsageError(f"gpu-mem: {error}") from error
        return text.strip()
    near = difflib.get_close_matches(name, CARDS, n=3, cutoff=0.3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known cards: {', '.join(CARDS)}"
    raise UsageError(f"gpu-mem {text!r} is neither a size like 24GB, nor 'auto', nor a card known here; {hint}")


def make_budget(text: str, device: DeviceFacts) -> MemoryBudget:
    """The budget for what the user asked, on this device; a budget larger than the device is clamped to it.

    Raises:
        UsageError: not a size, or headroom takes all of it.
    """
    asked = requested_bytes(text, device)
    total = min(asked, device.total_bytes)
    headroom = 0 if device.type == "cpu" else max(total // 50, 256 * MIB)
    if headroom >= total:
        raise UsageError(
            f"gpu-mem {text}: {format_bytes(total)} does not even hold the {format_bytes(headroom)} headroom that are "
            f"left alone on a card ({device.name})"
        )
    return MemoryBudget(
        total_bytes=total,
        headroom_bytes=headroom,
        clamped_from_bytes=asked if asked > total else None,
    )
