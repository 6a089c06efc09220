"""A set of 64-bit keys that takes eight bytes a key, for more keys than Python objects would fit into memory.

Keys lie in sorted arrays, each at least twice as long as the next (O'Neil et al. 1996, the log-structured merge tree):
a batch of keys is looked up in all of them and becomes the last one, and arrays of similar lengths are merged.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]


class KeySet:
    """Takes keys in batches. With n keys that are random numbers, n² / 2⁶⁵ of them are expected to equal another one:
    three in a million sets of ten million keys."""

    def __init__(self) -> None:
        self._runs: list[Keys] = []

    def __len__(self) -> int:
        """Number of distinct keys."""
        return sum(map(len, self._runs))

    def add(self, keys: Keys) -> NDArray[np.bool_]:
        """Adds ``keys``; returns ``[keys]``, True for each that is neither in the set nor earlier in the batch."""
        distinct, first = np.unique(keys, return_index=True)
        unknown = np.ones(len(distinct), dtype=np.bool_)
        for run in self._runs:
            at = np.searchsorted(run, distinct)
            at[at == len(run)] = 0
            unknown &= run[at] != distinct
        is_new = np.zeros(len(keys), dtype=np.bool_)
        is_new[first[unknown]] = True
        if unknown.any():
            self._runs.append(distinct[unknown])
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            merged = np.concatenate([self._runs.pop(), self._runs.pop()])
            merged.sort(kind="stable")  # which merges runs that are sorted already
            self._runs.append(merged)
        return is_new
