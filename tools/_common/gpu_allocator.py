"""What PyTorch's caching allocator makes of a sequence of allocations, without a GPU.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp` with its default settings, for one stream: sizes are rounded
up to 512 bytes; what is up to 1 MiB comes from segments of 2 MiB, what is smaller than 10 MiB from segments of 20 MiB,
anything else from segments of its own, rounded up to 2 MiB. The smallest free block that is large enough serves; its
rest is split off if it is 512 bytes or more (small) or more than 1 MiB (large), and else counts as allocated, too.
Free neighbours merge.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

ROUNDING = 512
_MIB = 2**20
_SMALL = _MIB  # largest allocation from small segments
_SMALL_SEGMENT = 2 * _MIB
_MIN_LARGE = 10 * _MIB  # smallest allocation with a segment of its own
_LARGE_SEGMENT = 20 * _MIB
_ROUND_SEGMENT = 2 * _MIB


@dataclass(eq=False)
class Block:
    """A part of a segment; neighbours are those of the same segment."""

    address: int
    size: int
    small: bool
    free: bool = False
    before: Block | None = None
    behind: Block | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.size, self.address


class CachingAllocator:
    """Counts bytes as `torch.cuda.memory_allocated` and `memory_reserved` would.

    Attributes:
        allocated: Bytes of the blocks in use.
        reserved: Bytes of all segments; none is given back.
        peak_allocated: The largest `allocated` so far.
    """

    def __init__(self) -> None:
        self.allocated = self.reserved = self.peak_allocated = 0
        self._free: dict[bool, list[tuple[tuple[int, int], Block]]] = {True: [], False: []}
        self._next_address = 0

    def allocate(self, nbytes: int) -> Block | None:
        """A block for so many bytes; None for no bytes, which take no memory."""
        if nbytes == 0:
            return None
        size = -(-nbytes // ROUNDING) * ROUNDING
        block = self._take_free(size) or self._new_segment(size)
        self._split(block, size)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def release(self, block: Block | None) -> None:
        """Takes back what `allocate` gave."""
        if block is None:
            return
        self.allocated -= block.size
        for neighbour in (block.before, block.behind):
            if neighbour is not None and neighbour.free:
                self._remove(neighbour)
                self._merge(block, neighbour)
        self._add(block)

    def _take_free(self, size: int) -> Block | None:
        pool = self._free[size <= _SMALL]
        index = bisect_left(pool, (size, -1), key=lambda entry: entry[0])
        if index == len(pool):
            return None
        block = pool.pop(index)[1]
        block.free = False
        return block

    def _new_segment(self, size: int) -> Block:
        if size <= _SMALL:
            segment = _SMALL_SEGMENT
        elif size < _MIN_LARGE:
            segment = _LARGE_SEGMENT
        else:
            segment = -(-size // _ROUND_SEGMENT) * _ROUND_SEGMENT
        block = Block(self._next_address, segment, size <= _SMALL)
        self._next_address += segment
        self.reserved += segment
        return block

    def _split(self, block: Block, size: int) -> None:
        rest = block.size - size
        if rest < ROUNDING or (not block.small and rest <= _SMALL):
            return
        behind = Block(block.address + size, rest, block.small, before=block, behind=block.behind)
        if block.behind is not None:
            block.behind.before = behind
        block.behind, block.size = behind, size
        self._add(behind)

    def _merge(self, block: Block, neighbour: Block) -> None:
        if neighbour is block.before:
            block.address, block.before = neighbour.address, neighbour.before
            if block.before is not None:
                block.before.behind = block
        else:
            block.behind = neighbour.behind
            if block.behind is not None:
                block.behind.before = block
        block.size += neighbour.size

    def _add(self, block: Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.key, block), key=lambda entry: entry[0])

    def _remove(self, block: Block) -> None:
        pool = self._free[block.small]
        del pool[bisect_left(pool, block.key, key=lambda entry: entry[0])]
