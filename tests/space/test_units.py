import pytest
from hypothesis import given
from hypothesis import strategies as st

from autofit.errors import UsageError
from autofit.space.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24GiB", 24 * 2**30),
        ("24576MiB", 24 * 2**30),
        ("123456B", 123456),
        ("1.5gb", 1_500_000_000),
        (" 8 GB ", 8 * 10**9),
    ],
)
def test_sizes_as_people_write_them(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["24GBB", "0GB", "0.0B", "24", "GB", "-3GB", "", "24 G B", "1e9B"])
def test_anything_else_is_refused_in_one_line(text):
    with pytest.raises(UsageError) as error:
        parse_bytes(text)
    assert "\n" not in str(error.value)


@given(st.integers(1, 10**13))
def test_what_is_printed_is_within_half_a_unit_of_its_last_digit(size):
    half = next(half for least, half in ((10**9, 5 * 10**6), (10**6, 5 * 10**4), (1, 50)) if size >= least)
    assert abs(parse_bytes(format_bytes(size).replace(" ", "")) - size) <= half
