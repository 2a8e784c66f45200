"""The caching allocator once more, after the C++: objects in linked lists, searched from end to end."""

from __future__ import annotations

from autofit.memory.allocator import OutOfSegments

MIB = 2**20


class Block:
    def __init__(self, segment: int, start: int, size: int, mapped: bool = True) -> None:
        self.segment, self.start, self.size, self.mapped = segment, start, size, mapped
        self.allocated = False
        self.before: Block | None = None
        self.after: Block | None = None

    def insert_after(self, other: Block) -> None:
        self.before, self.after = other, other.after
        if other.after:
            other.after.before = self
        other.after = self


class Reference:
    """One list of blocks for each pool, always searched from end to end."""

    def __init__(self, expandable: bool, limit: int | None) -> None:
        self.expandable, self.limit = expandable, limit
        self.blocks: dict[bool, list[Block]] = {True: [], False: []}  # by "is small"
        self.live: dict[int, Block | None] = {}
        self.segments = 0
        self.allocated = self.peak_allocated = self.reserved = self.peak_reserved = 0

    def free_blocks(self, small: bool) -> list[Block]:
        free = [block for block in self.blocks[small] if block.mapped and not block.allocated]
        return sorted(free, key=lambda block: (block.size, block.segment, block.start))

    def malloc(self, key: int, request: int) -> None:
        if request == 0:
            self.live[key] = None
            return
        size = -(-request // 512) * 512
        small = size <= MIB
        block = self.best_fit(small, size)
        if block is None:
            segment = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            if self.limit is not None and self.reserved + segment > self.limit:
                self.empty_cache()
                if self.reserved + segment > self.limit:
                    raise OutOfSegments(size, self.reserved, self.limit)
            block = self.map(small, size) if self.expandable else self.new_segment(small, segment)
        remaining = block.size - size
        if remaining >= 512 if small or self.expandable else remaining > MIB:
            rest = Block(block.segment, block.start + size, remaining)
            rest.insert_after(block)
            self.blocks[small].append(rest)
            block.size = size
        block.allocated = True
        self.live[key] = block
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def best_fit(self, small: bool, size: int) -> Block | None:
        def becomes(block: Block) -> int:
            return block.size + (block.after.size if block.after and not block.after.mapped else 0)

        fitting = [block for block in self.free_blocks(small) if block.size >= size]
        while len(fitting) > 1 and becomes(fitting[1]) < becomes(fitting[0]):
            fitting.pop(0)
        return fitting[0] if fitting else None

    def new_segment(self, small: bool, size: int, mapped: bool = True) -> Block:
        self.segments += 1
        block = Block(self.segments, 0, size, mapped)
        self.blocks[small].append(block)
        if mapped:
            self.reserve(size)
        return block

    def reserve(self, size: int) -> None:
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def map(self, small: bool, size: int) -> Block:
        block = self.with_room(small, size)
        if not block.mapped:
            block = self.map_block(small, block, min(size, block.size))
        while block.size < size:
            assert block.after is not None
            block = self.map_block(small, block.after, min(size - block.size, block.after.size))
        return block

    def with_room(self, small: bool, size: int) -> Block:
        unmapped = [block for block in self.blocks[small] if not block.mapped]
        for block in sorted(unmapped, key=lambda block: (block.segment, block.start)):
            first = block.before if block.before and not block.before.allocated else block
            room, at = 0, first
            while at and not at.allocated and room < size:
                room, at = room + at.size, at.after
            if room >= size:
                return first
        return self.new_segment(small, 2**50 // (20 * MIB) * 20 * MIB, mapped=False)

    def map_block(self, small: bool, block: Block, size: int) -> Block:
        page = 2 * MIB if small else 20 * MIB
        assert block.start % page == 0
        mapped = -(-size // page) * page
        if mapped < block.size:
            rest = Block(block.segment, block.start + mapped, block.size - mapped, mapped=False)
            rest.insert_after(block)
            self.blocks[small].append(rest)
            block.size = mapped
        block.mapped = True
        self.reserve(mapped)
        self.merge(small, block)
        return block

    def merge(self, small: bool, block: Block) -> None:
        """Unite a free block with the free neighbours that are in the same state."""
        for other in (block.before, block.after):
            if other is None or other.allocated or other.mapped != block.mapped:
                continue
            block.start = min(block.start, other.start)
            block.size += other.size
            if other is block.before:
                block.before = other.before
                if other.before:
                    other.before.after = block
            else:
                block.after = other.after
                if other.after:
                    other.after.before = block
            self.blocks[small].remove(other)

    def free(self, key: int) -> None:
        block = self.live.pop(key)
        if block:
            self.allocated -= block.size
            block.allocated = False
            self.merge(block in self.blocks[True], block)

    def empty_cache(self) -> None:
        for small in (False, True):
            for block in self.free_blocks(small):
                if self.expandable:
                    self.unmap(small, block)
                elif not block.before and not block.after:
                    self.blocks[small].remove(block)
                    self.reserved -= block.size

    def unmap(self, small: bool, block: Block) -> None:
        page = 2 * MIB if small else 20 * MIB
        first, last = -(-block.start // page) * page, (block.start + block.size) // page * page
        if first >= last:
            return
        if last < block.start + block.size:
            rest = Block(block.segment, last, block.start + block.size - last)
            rest.insert_after(block)
            self.blocks[small].append(rest)
        if block.start < first:
            hole = Block(block.segment, first, last - first)
            hole.insert_after(block)
            self.blocks[small].append(hole)
            block.size = first - block.start
            block = hole
        block.size, block.mapped = last - first, False
        self.reserved -= block.size
        self.merge(small, block)

    def check(self) -> None:
        """Every pool is whole segments, without gaps or overlaps, and the counters are their sums."""
        allocated = reserved = 0
        for blocks in self.blocks.values():
            for block in blocks:
                assert block.size > 0
                allocated += block.size if block.allocated else 0
                reserved += block.size if block.mapped else 0
                if block.after:
                    assert block.after.before is block
                    assert (block.after.segment, block.after.start) == (block.segment, block.start + block.size)
        assert (allocated, reserved) == (self.allocated, self.reserved)
