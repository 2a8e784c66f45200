"""What offloading costs over the link: never faster than without, and worse the slower the link."""

from dataclasses import replace

import pytest

from autofit.memory.estimate import Estimate
from autofit.memory.link import LINK_EFFICIENCY, with_link
from autofit.space.candidate import Candidate
from autofit.space.cards import CARDS

CARD = CARDS["rtx-4090"]
PLAIN = Candidate(micro_batch_size=2, max_seq_length=1000, checkpointed_layers=4)


def estimate(device_bytes, speed=2000.0):
    return Estimate(
        peak_allocated_bytes=device_bytes,
        peak_reserved_bytes=device_bytes,
        device_bytes=device_bytes,
        tokens_per_second=speed,
        breakdown_bytes={},
        peak_phase="forward",
    )


def speeds(*found, card=CARD):
    return [e.tokens_per_second for _, e in with_link(list(found), card)]


def test_checkpoints_cross_one_after_the_other_with_the_products():
    moved = 4 * 10**9
    away = (PLAIN.replace(offload_activations="checkpoints"), estimate(10**9))
    plain, offloaded = speeds((PLAIN, estimate(10**9 + moved)), away)
    seconds = 2000 / 2000 + 2 * moved / (CARD.pcie_bytes_per_second * LINK_EFFICIENCY)
    assert plain == 2000
    assert offloaded == pytest.approx(2000 / seconds)


def test_all_activations_cross_beside_the_products_until_the_link_is_the_slower():
    away = (PLAIN.replace(offload_activations="all"), estimate(10**9))
    assert speeds((PLAIN, estimate(2 * 10**9)), away)[1] == pytest.approx(2000)
    slow = replace(CARD, pcie_bytes_per_second=10**9)
    assert speeds((PLAIN, estimate(2 * 10**9)), away, card=slow)[1] < 1000


def test_without_an_equal_to_compare_or_a_speed_nothing_changes():
    away = PLAIN.replace(offload_activations="all")
    assert speeds((away, estimate(10**9))) == [2000]
    assert speeds((PLAIN, estimate(2 * 10**9, None)), (away, estimate(10**9, None))) == [None, None]
