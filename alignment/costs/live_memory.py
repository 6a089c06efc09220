"""Bytes of the tensors that exist at the same time, by what they hold."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from alignment.costs.heap import Heap


class _Block(NamedTuple):
    reference: weakref.ref[Any]
    size: int
    label: str
    address: int


class LiveMemory:
    """Counts storages from their first appearance until nothing refers to them.

    New ones are counted under ``label``. ``peak`` is the largest sum since ``begin``, and ``parts`` are its terms.
    ``heap`` is what they would be in on a CPU, and ``mapped`` the most that a file and what was read from it
    took together.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.heap = Heap()
        self.now: Counter[str] = Counter()
        self.total = 0
        self.peak = 0
        self.mapped = 0
        self.parts: dict[str, int] = {}
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
            self._known[key] = _Block(reference, size, name, self.heap.allocate(size))
            self.now[name] += size
            self.total += size
            if self.total > self.peak:
                self._at_peak()

    def map_file(self, size: int) -> None:
        """Counts a file that was read into memory beside what there is now."""
        self.mapped = max(self.mapped, self.total + size)
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
        self.peak = self.mapped = 0
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
        self.heap.free(block.address)

    def _at_peak(self) -> None:
        self.peak = self.total
        self.parts = {name: size for name, size in self.now.items() if size}
