"""The heap grows where nothing free is large enough, and gives what is free again."""

from __future__ import annotations

from alignment.costs.heap import ALIGNMENT, Heap

KIB = 1024
SLACK = 2 * ALIGNMENT + 64
"""Bytes of a block beyond what was asked for, at most."""


def test_it_grows_by_what_is_asked_for() -> None:
    heap = Heap()
    addresses = [heap.allocate(KIB) for _ in range(4)]
    assert len(set(addresses)) == 4
    assert 4 * KIB <= heap.top <= 4 * (KIB + SLACK)


def test_what_is_free_is_used_again_if_it_is_large_enough() -> None:
    heap = Heap()
    first, _ = heap.allocate(64 * KIB), heap.allocate(KIB)
    before = heap.top
    heap.free(first)
    heap.allocate(32 * KIB)
    heap.allocate(16 * KIB)
    assert heap.top == before
    heap.allocate(64 * KIB)
    assert heap.top >= before + 64 * KIB


def test_free_neighbours_become_one() -> None:
    heap = Heap()
    blocks = [heap.allocate(KIB) for _ in range(8)]
    heap.allocate(KIB)
    before = heap.top
    for block in blocks:
        heap.free(block)
    heap.allocate(8 * KIB)
    assert heap.top == before


def test_a_gap_that_is_too_small_stays() -> None:
    heap = Heap()
    small = heap.allocate(KIB)
    heap.allocate(KIB)
    heap.free(small)
    before = heap.top
    heap.allocate(2 * KIB)
    assert heap.top >= before + 2 * KIB
