"""The allocator's model: its rules one by one, and all of them against a plain transcription of the same rules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofit.memory.allocator import CachingAllocator, OutOfSegments
from tests.memory.plain_allocator import Reference

KIB, MIB = 2**10, 2**20
MODES = pytest.mark.parametrize("expandable", [False, True])


def allocator(expandable: bool = False, limit: int | None = None, **sizes: int) -> tuple[CachingAllocator, dict]:
    """An allocator that holds the named sizes, allocated in order, and the keys of the names."""
    made = CachingAllocator(expandable_segments=expandable, limit_bytes=limit)
    keys = {name: key for key, name in enumerate(sizes)}
    made.replay(list(keys.values()), list(sizes.values()))
    return made, keys


@MODES
@pytest.mark.parametrize(("size", "held"), [(0, 0), (1, 512), (512, 512), (513, 1024), (MIB + 1, MIB + 512)])
def test_a_request_is_rounded_to_512_bytes(expandable: bool, size: int, held: int) -> None:
    made, _ = allocator(expandable, a=size)
    assert made.allocated_bytes == made.peak_allocated_bytes == held


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (0, 0),
        (1, 2 * MIB),  # kSmallBuffer
        (MIB, 2 * MIB),  # kSmallSize is the last small one
        (MIB + 1, 20 * MIB),  # large_segment_size
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB - 1, 10 * MIB),  # rounded first, it is kMinLargeAlloc
        (10 * MIB + 1, 12 * MIB),  # kRoundLarge
        (33 * MIB, 34 * MIB),
    ],
)
def test_the_segment_that_a_first_request_gets(size: int, segment: int) -> None:
    made, _ = allocator(a=size)
    assert made.reserved_bytes == made.peak_reserved_bytes == segment


@pytest.mark.parametrize(
    ("size", "mapped"),
    [(1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (20 * MIB, 20 * MIB), (20 * MIB + 1, 40 * MIB)],
)
def test_the_pages_that_a_first_request_maps(size: int, mapped: int) -> None:
    made, _ = allocator(True, a=size)
    assert made.reserved_bytes == mapped


def test_a_large_block_keeps_up_to_a_mebibyte_too_much() -> None:
    """should_split: a large remainder must be over kSmallSize. 33 MiB leave exactly 1 MiB of 34."""
    made, _ = allocator(a=33 * MIB)
    assert made.allocated_bytes == 34 * MIB
    made, _ = allocator(a=33 * MIB - 512)
    assert made.allocated_bytes == 33 * MIB - 512


def test_a_small_block_and_an_expandable_one_are_always_split() -> None:
    made, keys = allocator(a=4 * KIB, b=MIB)
    made.free(keys["a"])
    made.malloc(9, 4 * KIB - 512)
    assert made.allocated_bytes == MIB + 4 * KIB - 512
    made, _ = allocator(True, a=20 * MIB - 512)
    assert made.allocated_bytes == 20 * MIB - 512
    made.malloc(9, MIB + 512)  # 512 bytes are left, at the end: the next page completes it
    assert made.reserved_bytes == 40 * MIB


@MODES
def test_the_smallest_free_block_that_fits_is_taken(expandable: bool) -> None:
    made, keys = allocator(expandable, a=14 * MIB, wall=2 * MIB, b=12 * MIB, wall2=2 * MIB)
    made.free(keys["a"])
    made.free(keys["b"])
    reserved = made.reserved_bytes
    made.malloc(8, 12 * MIB)  # b's place, or the one behind a's would not fit
    made.malloc(9, 14 * MIB)
    assert made.reserved_bytes == reserved


@MODES
def test_small_and_large_blocks_do_not_share_memory(expandable: bool) -> None:
    made, keys = allocator(expandable, a=20 * MIB)
    made.free(keys["a"])
    made.malloc(9, 512)
    assert made.reserved_bytes == 22 * MIB


def test_freed_neighbours_become_one_block() -> None:
    made, keys = allocator(a=6 * MIB, b=6 * MIB, c=6 * MIB)  # with 2 MiB left of one segment
    for name in "acb":
        made.free(keys[name])
    made.malloc(9, 20 * MIB)
    assert made.reserved_bytes == made.peak_reserved_bytes == 20 * MIB


def test_blocks_of_two_segments_stay_apart() -> None:
    made, keys = allocator(a=20 * MIB, b=20 * MIB)
    made.free(keys["a"])
    made.free(keys["b"])
    made.malloc(9, 40 * MIB)
    assert made.reserved_bytes == 80 * MIB


def test_an_expandable_segment_grows_by_what_its_free_end_lacks() -> None:
    made, keys = allocator(True, a=30 * MIB)  # two pages, 10 MiB free at the end
    made.malloc(9, 25 * MIB)
    assert made.reserved_bytes == 60 * MIB
    made.free(keys["a"])
    made.malloc(10, 31 * MIB)  # 30 MiB in front, 5 at the end: 26 more, two pages
    assert made.reserved_bytes == 100 * MIB


def test_the_block_that_can_grow_is_taken_last() -> None:
    """get_free_block's expandable_size: 4 MiB at the end fit, but the 6 MiB in front cannot become as large."""
    made, keys = allocator(True, a=6 * MIB, b=10 * MIB)
    made.free(keys["a"])
    made.malloc(8, 4 * MIB)
    made.malloc(9, 24 * MIB)  # so the 4 at the end were left to grow: one page
    assert made.reserved_bytes == 40 * MIB


def test_empty_cache_returns_whole_segments_only() -> None:
    made, keys = allocator(a=6 * MIB, b=6 * MIB, c=20 * MIB, small=512)
    for name in ("a", "c", "small"):
        made.free(keys[name])
    made.empty_cache()
    assert made.reserved_bytes == 20 * MIB
    assert made.peak_reserved_bytes == 42 * MIB


def test_empty_cache_unmaps_whole_pages_inside_a_block_and_they_are_mapped_again_first() -> None:
    made, keys = allocator(True, a=10 * MIB, b=60 * MIB, c=10 * MIB)  # four pages, b over two whole ones
    made.free(keys["b"])
    made.empty_cache()
    assert made.reserved_bytes == 40 * MIB
    made.malloc(9, 30 * MIB)  # the 10 MiB left of b in front, and one page
    assert made.reserved_bytes == 60 * MIB
    made.malloc(10, 30 * MIB)  # and the rest of b
    assert made.reserved_bytes == 80 * MIB


@MODES
def test_at_the_limit_the_cache_is_released_before_it_fails(expandable: bool) -> None:
    made, keys = allocator(expandable, limit=60 * MIB, a=20 * MIB, b=20 * MIB, c=20 * MIB)
    with pytest.raises(OutOfSegments) as failed:
        made.malloc(9, 40 * MIB)
    assert (failed.value.requested_bytes, failed.value.reserved_bytes) == (40 * MIB, 60 * MIB)
    made.free(keys["b"])
    made.free(keys["c"])
    made.malloc(9, 40 * MIB)
    assert made.allocated_bytes == made.reserved_bytes == made.peak_reserved_bytes == 60 * MIB


@MODES
def test_what_just_reaches_the_limit_releases_nothing(expandable: bool) -> None:
    made, keys = allocator(expandable, limit=22 * MIB, small=512)
    made.free(keys["small"])
    made.malloc(9, 20 * MIB)
    assert made.reserved_bytes == 22 * MIB


def test_peaks_and_their_reset() -> None:
    made, keys = allocator(a=30 * MIB, b=512)
    made.free(keys["a"])
    assert (made.allocated_bytes, made.peak_allocated_bytes) == (512, 30 * MIB + 512)
    made.empty_cache()
    made.reset_peak()
    assert (made.peak_allocated_bytes, made.peak_reserved_bytes) == (512, 2 * MIB)


def test_keys_are_live_once() -> None:
    made, _ = allocator(a=512, nothing=0)
    with pytest.raises(ValueError, match="key 0 is allocated twice"):
        made.malloc(0, 512)
    with pytest.raises(ValueError, match="key 1 is allocated twice"):
        made.malloc(1, 0)
    with pytest.raises(KeyError):
        made.free(7)
    with pytest.raises(ValueError, match="negative"):
        made.malloc(2, -1)
    made.free(1)
    assert made.allocated_bytes == 512


SIZES = st.one_of(
    st.integers(0, 4 * KIB),
    st.integers(0, 64).map(lambda n: n * 64 * KIB),
    st.integers(1, 48).map(lambda n: n * MIB),
    st.sampled_from([MIB, MIB + 1, 10 * MIB - 512, 10 * MIB, 19 * MIB, 20 * MIB, 39 * MIB, 40 * MIB]),
)
# An event: allocate so much, free the nth of the live, or empty the cache.
EVENTS = st.lists(
    st.one_of(
        SIZES.map(lambda size: ("malloc", size)),
        SIZES.map(lambda size: ("malloc", size)),
        st.integers(0, 10**6).map(lambda n: ("free", n)),
        st.integers(0, 10**6).map(lambda n: ("free", n)),
        st.just(("empty", 0)),
    ),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(events=EVENTS, expandable=st.booleans(), limit=st.sampled_from([None, None, 100 * MIB, 300 * MIB]))
def test_it_agrees_with_the_plain_transcription(events: list, expandable: bool, limit: int | None) -> None:
    made = CachingAllocator(expandable_segments=expandable, limit_bytes=limit)
    plain = Reference(expandable, limit)
    for key, (what, n) in enumerate(events):
        if what == "malloc":
            outcomes = []
            for model in (made, plain):
                try:
                    model.malloc(key, n)
                    outcomes.append("")
                except OutOfSegments as failed:
                    outcomes.append(str(failed))
            assert outcomes[0] == outcomes[1]
        elif what == "free" and plain.live:
            victim = sorted(plain.live)[n % len(plain.live)]
            made.free(victim)
            plain.free(victim)
        elif what == "empty":
            made.empty_cache()
            plain.empty_cache()
        plain.check()
        assert (made.allocated_bytes, made.reserved_bytes) == (plain.allocated, plain.reserved)
        assert (made.peak_allocated_bytes, made.peak_reserved_bytes) == (plain.peak_allocated, plain.peak_reserved)
        assert made.reserved_bytes >= made.allocated_bytes
    for key in list(plain.live):
        made.free(key)
    made.empty_cache()
    assert (made.allocated_bytes, made.reserved_bytes) == (0, 0)


@settings(max_examples=30, deadline=None)
@given(events=EVENTS, expandable=st.booleans())
def test_replay_is_one_event_after_another(events: list, expandable: bool) -> None:
    keys, sizes, live = [], [], []
    for key, (what, n) in enumerate(events):
        if what == "malloc":
            keys.append(key)
            sizes.append(n)
            live.append(key)
        elif what == "free" and live:
            keys.append(live.pop(n % len(live)))
            sizes.append(-1)
    at_once, singly = (CachingAllocator(expandable_segments=expandable) for _ in range(2))
    at_once.replay(keys, sizes)
    for key, size in zip(keys, sizes, strict=True):
        if size < 0:
            singly.free(key)
        else:
            singly.malloc(key, size)
    assert at_once.peak_allocated_bytes == singly.peak_allocated_bytes
    assert at_once.peak_reserved_bytes == singly.peak_reserved_bytes
