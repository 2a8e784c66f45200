import pytest

from autofit.space.budget import requested_bytes
from autofit.space.cards import CARDS, CHEAPEST_FIRST, card_of
from autofit.space.facts import DeviceFacts
from autofit.space.units import MIB


@pytest.mark.parametrize(
    ("reported", "mib", "name"),
    [
        ("Tesla T4", 15360, "t4"),
        ("Tesla T4", 15109, "t4"),  # an older driver
        ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 16376, "rtx-4070-ti-super"),
        ("NVIDIA GeForce RTX 3080", 10240, "rtx-3080"),
        ("NVIDIA GeForce RTX 3080", 12288, "rtx-3080-12gb"),
        ("NVIDIA GeForce RTX 3080", None, "rtx-3080"),
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "rtx-4060-ti-16gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 8188, None),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", 81920, "a100-80gb"),
        ("NVIDIA A10G", 22731, "a10g"),  # an older driver
        ("NVIDIA A10", 23028, "a10"),
        ("NVIDIA H100 80GB HBM3", 81559, "h100"),
        ("NVIDIA H100 PCIe", 81559, None),
        ("NVIDIA H200", 143771, "h200"),
        ("NVIDIA RTX A6000", 46068, "rtx-a6000"),  # with ECC turned on
        ("NVIDIA RTX 6000 Ada Generation", 49140, "rtx-6000-ada"),
        ("Tesla V100-SXM2-16GB", 16160, "v100-16gb"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4864, None),
        ("CPU (x86_64)", None, None),
    ],
)
def test_the_driver_s_name_finds_the_card(reported, mib, name):
    card = card_of(reported, None if mib is None else mib * MIB)
    assert (card and card.name) == name


def test_cards_that_people_know():
    assert CARDS["h100"].total_bytes == 81559 * MIB
    assert CARDS["rtx-4090"].compute_capability == (8, 9)
    assert CARDS["rtx-4090"].pcie_bytes_per_second == pytest.approx(31.5e9, rel=1e-3)
    assert [name for name, card in CARDS.items() if not card.bf16] == ["t4", "v100-16gb", "v100-32gb"]


def test_every_card_is_a_budget_of_its_memory():
    big = DeviceFacts(type="cuda", name="any", total_bytes=2**40)
    assert {name: requested_bytes(name, big) for name in CARDS} == {c.name: c.total_bytes for c in CHEAPEST_FIRST}


def test_figures_are_of_the_right_order():
    """A slip of a digit or a column shows: operations for each byte read lie within what such cards have."""
    for card in CARDS.values():
        assert 5 * 2**30 < card.total_bytes < 150 * 2**30
        assert 50 < card.dense_tflops * 1e12 / card.bandwidth_bytes_per_second < 500
        assert card.pcie_bytes_per_second in (15753846154, 31507692308, 63015384615)


def test_cheapest_first_is_less_memory_then_less_speed():
    keys = [(card.total_bytes, card.dense_tflops) for card in CHEAPEST_FIRST]
    assert keys == sorted(keys)
