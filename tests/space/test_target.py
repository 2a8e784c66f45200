"""Which device a plan is for."""

import pytest

from autofit.errors import UsageError
from autofit.space.cards import CARDS
from autofit.space.facts import DeviceFacts
from autofit.space.target import facts_of, target_device

CPU = DeviceFacts(type="cpu", name="CPU (x86_64)", total_bytes=8 * 10**9)
PRESENT = DeviceFacts(type="cuda", name="NVIDIA GeForce RTX 3090", total_bytes=24576 * 2**20, compute_capability=(8, 6))


def test_a_named_card_need_not_be_there():
    device, notes = target_device("RTX 4090", CPU)
    assert device == facts_of(CARDS["rtx-4090"])
    assert device.bf16
    assert not facts_of(CARDS["t4"]).bf16
    assert notes == ()
    assert target_device("t4", PRESENT)[0].name == "t4"
    assert target_device("rtx-3090", PRESENT)[0] is PRESENT


def test_auto_is_the_present_device():
    assert target_device("auto", PRESENT) == (PRESENT, ())
    device, (note,) = target_device("auto", CPU)
    assert device is CPU
    assert "plan for the CPU" in note


def test_a_size_is_part_of_the_present_gpu_or_of_the_smallest_card_that_has_it():
    assert target_device("16GB", PRESENT) == (PRESENT, ())
    device, (note,) = target_device("40GB", PRESENT)
    assert device.name == "a100-40gb"
    assert "NVIDIA GeForce RTX 3090 has 25.77 GB: planned for a100-40gb" in note
    device, (note,) = target_device("12GB", CPU)
    assert device.total_bytes >= 12 * 10**9
    assert all(card.total_bytes < 12 * 10**9 or card.total_bytes >= device.total_bytes for card in CARDS.values())
    assert note.startswith("no GPU here: planned for ")


def test_more_than_any_card_has_is_refused():
    with pytest.raises(UsageError, match="the largest is h200"):
        target_device("200GB", CPU)
