"""A set of keys in little memory is a set."""

from __future__ import annotations

import itertools
import random
import tracemalloc

import numpy as np
from numpy.typing import NDArray

from alignment.data.key_set import KeySet


def test_keys_are_new_once_whatever_the_batches() -> None:
    rng = random.Random(0)
    seen: set[int] = set()
    keys = KeySet()
    for size in [0, 1, 1, 500, *(rng.randint(0, 60) for _ in range(60))]:
        batch = [rng.choice([0, 2**64 - 1, rng.randrange(1_500), rng.getrandbits(64)]) for _ in range(size)]
        expected = []
        for key in batch:
            expected.append(key not in seen)
            seen.add(key)
        assert keys.add(np.array(batch, dtype=np.uint64)).tolist() == expected
        assert len(keys) == len(seen)
    assert len(seen) > 1_000


def _keys(start: int, end: int) -> NDArray[np.uint64]:
    """Different keys, spread over all of the numbers."""
    return np.arange(start, end, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def test_a_key_takes_eight_bytes_and_few_arrays_hold_them() -> None:
    keys = KeySet()
    for start in range(0, 64_000, 500):
        keys.add(_keys(start, start + 500))
    assert sum(run.nbytes for runs in keys._parts for run in runs) == 8 * 64_000
    for runs in keys._parts:
        assert len(runs) <= 8
        assert all(len(longer) >= 2 * len(shorter) for longer, shorter in itertools.pairwise(runs))


def test_merging_arrays_never_holds_all_keys_twice() -> None:
    """With 128 batches of equal size, all of the arrays are merged at the end."""
    keys = KeySet()
    tracemalloc.start()
    for start in range(0, 128_000, 1_000):
        keys.add(_keys(start, start + 1_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(keys) == 128_000
    assert peak < 1.25 * 8 * 128_000
