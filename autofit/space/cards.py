"""The cards that are known by name: what a driver and a data sheet say of each. Facts, no measurements."""

from __future__ import annotations

from dataclasses import dataclass

from autofit.space.units import MIB


@dataclass(frozen=True)
class Card:
    """One NVIDIA card.

    Attributes:
        name: as people type it, in lower case.
        total_bytes: memory as the driver reports it (nvidia-smi's total, ECC as the card is delivered).
        compute_capability: (major, minor).
        dense_tflops: 10¹² operations a second of the tensor cores, 16-bit inputs added up in float32, no sparsity.
        bandwidth_bytes_per_second: of the card's own memory.
        pcie_bytes_per_second: of the link to the host, in one direction, after line coding.
    """

    name: str
    total_bytes: int
    compute_capability: tuple[int, int]
    dense_tflops: float
    bandwidth_bytes_per_second: int
    pcie_bytes_per_second: int

    @property
    def bf16(self) -> bool:
        """Whether matrix products in bfloat16 run at full speed (compute capability ≥ 8.0)."""
        return self.compute_capability >= (8, 0)


def _card(
    name: str, mib: int, capability: tuple[int, int], tflops: float, gigabytes_per_second: float, pcie: tuple[int, int]
) -> Card:
    """`pcie` is (generation, lanes): 8 GT/s a lane in the third, doubled with each, 128 bits of 130 for data."""
    generation, lanes = pcie
    link = round(8e9 * 2 ** (generation - 3) * lanes * 128 / 130 / 8)
    return Card(name, mib * MIB, capability, tflops, round(gigabytes_per_second * 1e9), link)


# Memory: nvidia-smi's totals, as current drivers print them. The rest: NVIDIA's data sheets, and for GeForce the tables
# in its Ampere GA102, Ada and Blackwell architecture papers. Where those leave a GeForce out, its tensor rate follows
# from cores × boost clock as theirs do: with sums in float32 twice the float32 rate outside the tensor cores. A10 and
# A10G differ in fact. V100, A100, H100 and H200 are the SXM boards.
_ALL = (
    _card("t4", 15360, (7, 5), 65, 320, (3, 16)),
    _card("rtx-3060", 12288, (8, 6), 25.5, 360, (4, 16)),
    _card("rtx-3060-ti", 8192, (8, 6), 32.4, 448, (4, 16)),
    _card("rtx-3070", 8192, (8, 6), 40.6, 448, (4, 16)),
    _card("rtx-3080", 10240, (8, 6), 59.5, 760, (4, 16)),
    _card("rtx-3080-12gb", 12288, (8, 6), 61.3, 912, (4, 16)),
    _card("rtx-3090", 24576, (8, 6), 71, 936, (4, 16)),
    _card("rtx-3090-ti", 24564, (8, 6), 80, 1008, (4, 16)),
    _card("rtx-4060", 8188, (8, 9), 30.2, 272, (4, 8)),
    _card("rtx-4060-ti-16gb", 16380, (8, 9), 44.1, 288, (4, 8)),
    _card("rtx-4070", 12282, (8, 9), 58.3, 504, (4, 16)),
    _card("rtx-4070-ti", 12282, (8, 9), 80.2, 504, (4, 16)),
    _card("rtx-4070-ti-super", 16376, (8, 9), 88.2, 672, (4, 16)),
    _card("rtx-4080", 16376, (8, 9), 97.5, 716.8, (4, 16)),
    _card("rtx-4080-super", 16376, (8, 9), 104.4, 736.3, (4, 16)),
    _card("rtx-4090", 24564, (8, 9), 165.2, 1008, (4, 16)),
    _card("rtx-5060-ti-16gb", 16311, (12, 0), 47.4, 448, (5, 8)),
    _card("rtx-5070", 12227, (12, 0), 61.7, 672, (5, 16)),
    _card("rtx-5070-ti", 16303, (12, 0), 87.9, 896, (5, 16)),
    _card("rtx-5080", 16303, (12, 0), 112.6, 960, (5, 16)),
    _card("rtx-5090", 32607, (12, 0), 209.5, 1792, (5, 16)),
    _card("a10", 23028, (8, 6), 125, 600, (4, 16)),
    _card("a10g", 23028, (8, 6), 70, 600, (4, 16)),
    _card("l4", 23034, (8, 9), 121, 300, (4, 16)),
    _card("l40s", 46068, (8, 9), 362, 864, (4, 16)),
    _card("a40", 46068, (8, 6), 149.7, 696, (4, 16)),
    _card("rtx-a6000", 49140, (8, 6), 154.8, 768, (4, 16)),
    _card("rtx-6000-ada", 49140, (8, 9), 364.2, 960, (4, 16)),
    _card("v100-16gb", 16384, (7, 0), 125, 900, (3, 16)),
    _card("v100-32gb", 32768, (7, 0), 125, 900, (3, 16)),
    _card("a100-40gb", 40960, (8, 0), 312, 1555, (4, 16)),
    _card("a100-80gb", 81920, (8, 0), 312, 2039, (4, 16)),
    _card("h100", 81559, (9, 0), 989.4, 3350, (5, 16)),
    _card("h200", 143771, (9, 0), 989.4, 4800, (5, 16)),
)
CARDS: dict[str, Card] = {card.name: card for card in _ALL}

# From the card that asks least of a purse to the one that asks most. Prices move and differ by place, so none is kept:
# less memory counts as cheaper, and with equal memory the slower card.
CHEAPEST_FIRST: tuple[Card, ...] = tuple(sorted(_ALL, key=lambda card: (card.total_bytes, card.dense_tflops)))

# What NVML and torch call a card, where that is not its name here with NVIDIA's words before it.
_REPORTED_AS = {
    "rtx-3080": ("rtx-3080", "rtx-3080-12gb"),
    "rtx-4060-ti": ("rtx-4060-ti-16gb",),
    "rtx-5060-ti": ("rtx-5060-ti-16gb",),
    "rtx-6000-ada-generation": ("rtx-6000-ada",),
    "v100-sxm2-16gb": ("v100-16gb",),
    "v100-pcie-16gb": ("v100-16gb",),
    "v100-sxm2-32gb": ("v100-32gb",),
    "v100-sxm3-32gb": ("v100-32gb",),
    "v100-pcie-32gb": ("v100-32gb",),
    "a100-sxm4-40gb": ("a100-40gb",),
    "a100-pcie-40gb": ("a100-40gb",),
    "a100-sxm4-80gb": ("a100-80gb",),
    "a100-80gb-pcie": ("a100-80gb",),
    "h100-80gb-hbm3": ("h100",),
}
_MAKER = ("nvidia", "tesla", "geforce")


def card_of(device_name: str, total_bytes: int | None = None) -> Card | None:
    """The card that NVML or torch reports as "NVIDIA GeForce RTX 4090", "Tesla T4", "NVIDIA H100 80GB HBM3".

    None for what is not exactly one of these: a laptop's chip, a slice of a card, a board with other figures (H100
    PCIe, H100 NVL). The PCIe boards of V100 and A100 count as the SXM ones: 5 to 10 % slower, the same memory.

    Args:
        total_bytes: what the driver reports, to tell apart cards of one name (an RTX 3080 has 10 or 12 GB; without it,
            the smaller). A card whose memory is more than 8 % off is another one; drivers and ECC move it by less.
    """
    words = [word for word in device_name.lower().replace("_", " ").split() if word not in _MAKER]
    reported = "-".join(words)
    named = _REPORTED_AS.get(reported, (reported,) if reported in CARDS else ())
    cards = [CARDS[name] for name in named]
    if total_bytes is None:
        return cards[0] if cards else None
    near = [card for card in cards if abs(card.total_bytes - total_bytes) <= 0.08 * card.total_bytes]
    return min(near, key=lambda card: abs(card.total_bytes - total_bytes), default=None)
