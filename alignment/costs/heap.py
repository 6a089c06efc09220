"""The heap of glibc's malloc, as far as it decides how much of it is resident.

A worker's heap only grows (alignment/pipeline/backends/command.py), so its size is the highest address that was
ever in use. PyTorch asks for blocks at multiples of 64 bytes. For one of these, glibc looks for a free block with room
for any alignment, so a freed block is too small for the next request of the same size unless a neighbour is free too.
"""

from __future__ import annotations

import bisect

ALIGNMENT = 64
_ROOM = ALIGNMENT + 32
"""Bytes beyond a block's own that glibc looks for: the alignment, and the smallest block that it can give back."""
_HEADER = 16


class Heap:
    """Free blocks are known by address and by size; ``top`` is the size of the heap."""

    def __init__(self) -> None:
        self.top = 0
        self._by_start: dict[int, int] = {}
        self._by_end: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []
        self._used: dict[int, tuple[int, int]] = {}

    def allocate(self, size: int) -> int:
        """The address of a block of ``size`` bytes: in the smallest free one with room, else at the top."""
        own = -(-(size + _HEADER) // _HEADER) * _HEADER
        index = bisect.bisect_left(self._by_size, (own + _ROOM, 0))
        if index < len(self._by_size):
            free, start = self._by_size[index]
            end = start + free
            self._take(start)
        else:
            start = self._by_end.get(self.top, self.top)  # a free block at the top grows
            if start != self.top:
                self._take(start)
            end = self.top = max(self.top, start + own + _ROOM)
        address = -(-(start + _HEADER) // ALIGNMENT) * ALIGNMENT - _HEADER
        if address > start:
            self._give(start, address)
        if end > address + own:
            self._give(address + own, end)
        self._used[address] = (address, address + own)
        return address

    def free(self, address: int) -> None:
        """Gives a block back; free neighbours become one."""
        self._give(*self._used.pop(address))

    def _give(self, start: int, end: int) -> None:
        if (before := self._by_end.get(start)) is not None:
            self._take(before)
            start = before
        if (after := self._by_start.get(end)) is not None:
            self._take(end)
            end = after
        self._by_start[start], self._by_end[end] = end, start
        bisect.insort(self._by_size, (end - start, start))

    def _take(self, start: int) -> None:
        end = self._by_start.pop(start)
        del self._by_end[end]
        del self._by_size[bisect.bisect_left(self._by_size, (end - start, start))]
