"""Bytes of the tensors that exist at the same time, by what they hold."""

from __future__ import annotations

import bisect
import functools
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

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


class _Block(NamedTuple):
    """A storage; one that is part of a mapped file has no ``address`` in the heap."""

    reference: weakref.ref[Any]
    size: int
    label: str
    address: int | None


class LiveMemory:
    """Counts storages from their first appearance until nothing refers to them. New ones are counted under ``label``.
    ``peak`` is the largest sum since ``begin``, and ``parts`` are its terms. ``resident`` is what a process on a CPU
    would hold for them: its ``heap`` and its ``mapped`` files. Weights that are used as they are stored stay in their
    file."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.heap = Heap()
        self.now: Counter[str] = Counter()
        self.total = 0
        self.peak = 0
        self.mapped = 0
        self.resident = 0
        self.parts: dict[str, int] = {}
        self._in_file = False
        self._known: dict[int, _Block] = {}

    def see(self, tensors: Sequence[Tensor], label: str = "") -> None:
        """Counts those of the tensors' storages that are new."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            size, name = storage.nbytes(), label or self.label
            reference = weakref.ref(storage, functools.partial(self._forget, key))
            self._known[key] = _Block(reference, size, name, self._address(size))
            self.now[name] += size
            self.total += size
            self.resident = max(self.resident, self.heap.top + self.mapped)
            if self.total > self.peak:
                self._at_peak()

    def _address(self, size: int) -> int | None:
        if self._in_file:
            self.mapped += size
            return None
        return self.heap.allocate(size)

    @contextmanager
    def from_file(self) -> Iterator[None]:
        """Counts new storages in a ``with`` block as parts of a mapped file."""
        self._in_file = True
        try:
            yield
        finally:
            self._in_file = False

    def read_file(self, size: int) -> None:
        """Counts a file that was mapped while it was converted, beside what there is now."""
        self.resident = max(self.resident, self.heap.top + self.mapped + size)
        if self.total + size > self.peak:
            self.peak, self.parts = self.total + size, {**self.now, "file": size}

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Counts a storage under another label from now on."""
        key = tensor.untyped_storage()._cdata
        if (block := self._known.get(key)) is not None:
            self.now[block.label] -= block.size
            self.now[label] += block.size
            self._known[key] = block._replace(label=label)

    def begin(self) -> None:
        """Starts a phase with its own peak."""
        self.resident = self.heap.top + self.mapped
        self._at_peak()

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Counts new storages under ``label`` in a ``with`` block."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def _forget(self, key: int, _: object) -> None:
        block = self._known.pop(key)
        self.now[block.label] -= block.size
        self.total -= block.size
        if block.address is None:
            self.mapped -= block.size
        else:
            self.heap.free(block.address)

    def _at_peak(self) -> None:
        self.peak = self.total
        self.parts = {name: size for name, size in self.now.items() if size}
