import pytest

from autofit.errors import UsageError
from autofit.space.budget import make_budget
from autofit.space.cards import CARDS
from autofit.space.facts import DeviceFacts
from autofit.space.units import MIB

H100 = DeviceFacts(type="cuda", name="H100", total_bytes=81559 * MIB, compute_capability=(9, 0))
CPU = DeviceFacts(type="cpu", name="cpu", total_bytes=24 * 2**30)


def test_a_size_a_card_and_auto():
    assert make_budget("24GB", H100).total_bytes == 24 * 10**9
    assert make_budget("RTX 4090", H100).total_bytes == CARDS["rtx-4090"].total_bytes
    assert make_budget("auto", H100).total_bytes == H100.total_bytes


def test_headroom_is_two_percent_at_least_256_mib_and_nothing_on_a_cpu():
    assert make_budget("24GB", H100).headroom_bytes == 480 * 10**6
    assert make_budget("8GB", H100).headroom_bytes == 256 * MIB
    assert make_budget("8GB", CPU).headroom_bytes == 0
    assert make_budget("8GB", H100).usable_bytes == 8 * 10**9 - 256 * MIB


def test_a_budget_larger_than_the_card_is_clamped_and_says_so():
    budget = make_budget("100GB", H100)
    assert budget.total_bytes == H100.total_bytes
    assert budget.clamped_from_bytes == 100 * 10**9
    assert make_budget("24GB", H100).clamped_from_bytes is None


@pytest.mark.parametrize(
    ("text", "hint"),
    [("rtx-4099", "rtx-4090"), ("24GBB", "24GB"), ("0", "24GB"), ("100MB", "headroom"), (24, "no text")],
)
def test_what_cannot_be_a_budget_says_what_could(text, hint):
    with pytest.raises(UsageError, match=hint):
        make_budget(text, H100)
