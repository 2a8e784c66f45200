"""What PyTorch's CUDA caching allocator holds and reserves for a sequence of allocations and frees on one stream.

The rules and the constants are those of `DeviceCachingAllocator` in c10/cuda/CUDACachingAllocator.cpp and of
c10/core/AllocatorConfig.h (torch 2.11 to 2.13), with `max_split_size`, `garbage_collection_threshold` and
`roundup_power2_divisions` at their defaults. Nothing here touches a device.

A block is an interval of imaginary addresses in units of 512 bytes, written as one integer, `size << 40 | address`: a
sorted list of these integers is in the allocator's order of best fit (by size, then by address). New segments get
ascending addresses, each with a gap before the next, so that blocks of two segments never touch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

UNIT_BYTES = 512  # kMinBlockSize
MIB = 2**20 // UNIT_BYTES

SMALL_SIZE = 1 * MIB  # kSmallSize: a larger request goes to the large pool
SMALL_BUFFER = 2 * MIB  # kSmallBuffer: a segment, or a page, of the small pool
MIN_LARGE_ALLOC = 10 * MIB  # kMinLargeAlloc: from here on a request gets a segment of its own size
LARGE_SEGMENT = 20 * MIB  # large_segment_size(): what smaller requests share; a page of the expandable large pool
ROUND_LARGE = 2 * MIB  # kRoundLarge

ADDRESS_BITS = 40
ADDRESS_MASK = 2**ADDRESS_BITS - 1
# The expandable segments' address space. CUDA's is 9/8 of the card's memory: neither is ever used up.
LARGE_POOL_BASE = LARGE_SEGMENT * 2**22
ADDRESS_SPACE = LARGE_POOL_BASE - LARGE_SEGMENT


class OutOfSegments(Exception):
    """A request needs a segment that would cross the limit, and releasing the cached ones did not help.

    `requested_bytes` is the request after rounding, `reserved_bytes` what is held after the release.
    """

    def __init__(self, requested_bytes: int, reserved_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"{requested_bytes} bytes do not fit: {reserved_bytes} bytes are reserved, {limit_bytes} are allowed"
        )
        self.requested_bytes = requested_bytes
        self.reserved_bytes = reserved_bytes
        self.limit_bytes = limit_bytes


class CachingAllocator:
    """The allocator's state after the events so far.

    `expandable_segments` is the setting of that name. `limit_bytes` is what `set_per_process_memory_fraction` would
    allow: it is held, as there, against the size of the segment that a request asks for; with expandable segments the
    last page mapped may exceed it.
    """

    def __init__(self, *, expandable_segments: bool = False, limit_bytes: int | None = None) -> None:
        self._expandable = expandable_segments
        self._limit_bytes = limit_bytes
        self._live: dict[int, int] = {}  # key → block; 0 for a request of no bytes
        self._small: list[int] = []  # free blocks, sorted
        self._large: list[int] = []
        self._free_end: dict[int, int] = {}  # a free block's first address → the one after its last
        self._free_start: dict[int, int] = {}  # and back
        self._segments: dict[int, int] = {}  # address → size; without expandable segments
        self._next_address = 0
        self._unmapped: dict[int, int] = {}  # address → size; with expandable segments
        if expandable_segments:
            self._unmapped = {0: ADDRESS_SPACE, LARGE_POOL_BASE: ADDRESS_SPACE}
        self._allocated = self._peak_allocated = 0
        self._reserved = self._peak_reserved = 0

    @property
    def allocated_bytes(self) -> int:
        """`torch.cuda.memory_allocated()`: the sizes of the blocks handed out, unsplit remainders included."""
        return self._allocated * UNIT_BYTES

    @property
    def peak_allocated_bytes(self) -> int:
        """`torch.cuda.max_memory_allocated()`."""
        return self._peak_allocated * UNIT_BYTES

    @property
    def reserved_bytes(self) -> int:
        """`torch.cuda.memory_reserved()`."""
        return self._reserved * UNIT_BYTES

    @property
    def peak_reserved_bytes(self) -> int:
        """`torch.cuda.max_memory_reserved()`."""
        return self._peak_reserved * UNIT_BYTES

    def reset_peak(self) -> None:
        """`torch.cuda.reset_peak_memory_stats()`."""
        self._peak_allocated = self._allocated
        self._peak_reserved = self._reserved

    def malloc(self, key: int, size: int) -> None:
        """Allocate `size` bytes under `key`; see `replay` for the errors."""
        if size < 0:
            raise ValueError(f"a size of {size} bytes: it must not be negative")
        self.replay((key,), (size,))

    def free(self, key: int) -> None:
        """Free what `key` holds; KeyError if it holds nothing."""
        self.replay((key,), (-1,))

    def replay(self, keys: Sequence[int], sizes: Sequence[int]) -> None:
        """Carry out the events in order: `sizes[i] >= 0` allocates that many bytes under `keys[i]`, -1 frees `keys[i]`.

        ValueError if a key is allocated while it is live, KeyError if one is freed that is not, OutOfSegments at the
        event that crosses the limit. After any of them the state is the one before that event, but for the cached
        segments that OutOfSegments has released.
        """
        live, free_end, free_start = self._live, self._free_end, self._free_start
        small, large, unmapped = self._small, self._large, self._unmapped
        bits, mask, small_size = ADDRESS_BITS, ADDRESS_MASK, SMALL_SIZE
        spare_large = 0 if self._expandable else small_size  # should_split: what is not more stays with the block
        allocated, peak = self._allocated, self._peak_allocated
        try:
            for key, size in zip(keys, sizes, strict=True):
                if size > 0:
                    if key in live:
                        raise ValueError(f"key {key} is allocated twice")
                    units = (size + UNIT_BYTES - 1) // UNIT_BYTES
                    if units <= small_size:
                        pool, spare = small, 0
                    else:
                        pool, spare = large, spare_large
                    at = bisect_left(pool, units << bits)
                    if at < len(pool):
                        start = pool[at] & mask
                        if unmapped and free_end[start] in unmapped:
                            at = self._best_expandable(pool, at)
                            start = pool[at] & mask
                        del pool[at]
                        end = free_end.pop(start)
                        del free_start[end]
                    else:
                        start, end = self._grow(units)
                        at = len(pool)
                    rest = start + units
                    if end - rest > spare:
                        free_end[rest] = end
                        free_start[end] = rest
                        insort(pool, (end - rest) << bits | rest, 0, at)
                    else:
                        units = end - start
                    live[key] = units << bits | start
                    allocated += units
                    if allocated > peak:
                        peak = allocated
                elif size < 0:
                    block = live.pop(key)
                    if block:
                        units = block >> bits
                        allocated -= units
                        pool = small if units <= small_size else large
                        start = block & mask
                        end = start + units
                        if start in free_start:
                            before = free_start.pop(start)
                            del pool[bisect_left(pool, (start - before) << bits | before)]
                            start = before
                        if end in free_end:
                            after = free_end.pop(end)
                            del pool[bisect_left(pool, (after - end) << bits | end)]
                            end = after
                        free_end[start] = end
                        free_start[end] = start
                        insort(pool, (end - start) << bits | start)
                else:
                    if key in live:
                        raise ValueError(f"key {key} is allocated twice")
                    live[key] = 0
        finally:
            self._allocated, self._peak_allocated = allocated, peak

    def empty_cache(self) -> None:
        """`torch.cuda.empty_cache()`: unused segments go back, of expandable ones the unused whole pages."""
        if self._expandable:
            self._unmap_pages(self._large, LARGE_SEGMENT)
            self._unmap_pages(self._small, SMALL_BUFFER)
            return
        for start, end in list(self._free_end.items()):
            if self._segments.get(start) == end - start:
                self._take(start)
                self._reserved -= self._segments.pop(start)

    def _grow(self, units: int) -> tuple[int, int]:
        """Get memory from the device: the first address, and the one after the last, of a block of ≥ `units`."""
        if units <= SMALL_SIZE:
            segment = SMALL_BUFFER
        elif units < MIN_LARGE_ALLOC:
            segment = LARGE_SEGMENT
        else:
            segment = _round_up(units, ROUND_LARGE)
        self._make_room(units, segment)
        if self._expandable:
            return self._map_pages(units)
        start = self._next_address
        self._next_address = start + segment + 1
        self._segments[start] = segment
        self._reserve(segment)
        return start, start + segment

    def _make_room(self, units: int, segment: int) -> None:
        """Release the cached segments if one more would cross the limit; OutOfSegments if it still does."""
        limit = self._limit_bytes
        if limit is None or (self._reserved + segment) * UNIT_BYTES <= limit:
            return
        self.empty_cache()
        if (self._reserved + segment) * UNIT_BYTES > limit:
            raise OutOfSegments(units * UNIT_BYTES, self.reserved_bytes, limit)

    def _reserve(self, units: int) -> None:
        self._reserved += units
        self._peak_reserved = max(self._peak_reserved, self._reserved)

    # Expandable segments: one for each pool, whose pages are mapped as they are needed

    def _best_expandable(self, pool: list[int], at: int) -> int:
        """`get_free_block`'s choice: a block that can grow counts as large as it can become."""

        def can_become(block: int) -> int:
            return (block >> ADDRESS_BITS) + self._unmapped.get(self._free_end[block & ADDRESS_MASK], 0)

        while at + 1 < len(pool) and can_become(pool[at + 1]) < can_become(pool[at]):
            at += 1
        return at

    def _map_pages(self, units: int) -> tuple[int, int]:
        """`try_allocate_expandable_block`: map pages at the lowest address where `units` have room."""
        page = SMALL_BUFFER if units <= SMALL_SIZE else LARGE_SEGMENT
        start = self._lowest_room(units)
        end = self._take(start) if start in self._free_end else start
        while end - start < units:
            hole = self._unmapped.pop(end)
            pages = min(_round_up(units - (end - start), page), hole)
            self._reserve(pages)
            if pages < hole:
                self._unmapped[end + pages] = hole - pages
            end += pages
            if end in self._free_end:
                end = self._take(end)
        return start, end

    def _lowest_room(self, units: int) -> int:
        """`find_expandable_block`: where a hole, with the free blocks and holes around it, has room for `units`."""
        holes = sorted(hole for hole in self._unmapped if (hole < LARGE_POOL_BASE) == (units <= SMALL_SIZE))
        for hole in holes[:-1]:
            start = end = self._free_start.get(hole, hole)
            while end in self._free_end or end in self._unmapped:
                end = self._free_end.get(end) or end + self._unmapped[end]
            if end - start >= units:
                return start
        return self._free_start.get(holes[-1], holes[-1])  # the address space that has never been used

    def _unmap_pages(self, pool: list[int], page: int) -> None:
        """`release_blocks`: give back the whole pages inside each free block."""
        for block in list(pool):
            start = block & ADDRESS_MASK
            end = start + (block >> ADDRESS_BITS)
            first, last = _round_up(start, page), end // page * page
            if first >= last:
                continue
            self._take(start)
            self._reserved -= last - first
            if start < first:
                self._put(pool, start, first)
            if last < end:
                self._put(pool, last, end)
            hole = last - first + self._unmapped.pop(last, 0)
            before = next((at for at, size in self._unmapped.items() if at + size == first), None)
            if before is None:
                self._unmapped[first] = hole
            else:
                self._unmapped[before] += hole

    def _take(self, start: int) -> int:
        """Take the free block at `start` off the free lists; the address after its last."""
        end = self._free_end.pop(start)
        del self._free_start[end]
        # A free block may be of any size in either pool: it is where its key is.
        block = (end - start) << ADDRESS_BITS | start
        for pool in (self._small, self._large):
            at = bisect_left(pool, block)
            if at < len(pool) and pool[at] == block:
                del pool[at]
                break
        return end

    def _put(self, pool: list[int], start: int, end: int) -> None:
        """Enter a block with no free neighbours into the free list."""
        self._free_end[start] = end
        self._free_start[end] = start
        insort(pool, (end - start) << ADDRESS_BITS | start)


def _round_up(units: int, multiple: int) -> int:
    return -(-units // multiple) * multiple
