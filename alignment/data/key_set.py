"""A set of 64-bit keys that takes eight bytes a key, for more keys than Python objects would fit into memory.

Keys lie in sorted arrays, each at least twice as long as the next (O'Neil et al. 1996, the log-structured merge tree):
a batch of keys is looked up in all of them and becomes the last one, and arrays of similar lengths are merged. While
two are merged, their keys are in memory twice. So the keys are divided by their first bits into parts, each with its
own arrays.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]

BITS = 4
"""The first bits of a key, which are the number of its part."""
_STARTS = np.arange(1, 2**BITS, dtype=np.uint64) << np.uint64(64 - BITS)
"""The smallest key of each part but the first."""


class KeySet:
    """Takes keys in batches. With n keys that are random numbers, n² / 2⁶⁵ of them are expected to equal another one:
    three in a million sets of ten million keys."""

    def __init__(self) -> None:
        self._parts: list[list[Keys]] = [[] for _ in range(2**BITS)]

    def __len__(self) -> int:
        """Number of distinct keys."""
        return sum(len(run) for runs in self._parts for run in runs)

    def add(self, keys: Keys) -> NDArray[np.bool_]:
        """Adds ``keys``; returns ``[keys]``, True for each that is neither in the set nor earlier in the batch."""
        distinct, first = np.unique(keys, return_index=True)
        batches = np.split(distinct, np.searchsorted(distinct, _STARTS))
        unknown = np.concatenate([_add(runs, batch) for runs, batch in zip(self._parts, batches, strict=True)])
        is_new = np.zeros(len(keys), dtype=np.bool_)
        is_new[first[unknown]] = True
        return is_new


def _add(runs: list[Keys], keys: Keys) -> NDArray[np.bool_]:
    """Adds sorted and distinct ``keys`` to the arrays of a part; returns ``[keys]``, True for each that is in none."""
    unknown = np.ones(len(keys), dtype=np.bool_)
    for run in runs:
        at = np.searchsorted(run, keys)
        at[at == len(run)] = 0
        unknown &= run[at] != keys
    if unknown.any():
        runs.append(keys[unknown])
    while len(runs) > 1 and len(runs[-2]) < 2 * len(runs[-1]):
        merged = np.concatenate([runs.pop(), runs.pop()])
        merged.sort(kind="stable")  # which merges runs that are sorted already
        runs.append(merged)
    return unknown
