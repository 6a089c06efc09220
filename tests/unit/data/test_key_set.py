"""A set of keys in little memory is a set."""

from __future__ import annotations

import itertools
import random

import numpy as np

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


def test_a_key_takes_eight_bytes_and_few_arrays_hold_them() -> None:
    keys = KeySet()
    for start in range(0, 64_000, 500):
        keys.add(np.arange(start, start + 500, dtype=np.uint64) * np.uint64(2**40 + 1))
    assert sum(run.nbytes for run in keys._runs) == 8 * 64_000
    assert len(keys._runs) <= 8
    lengths = [len(run) for run in keys._runs]
    assert all(longer >= 2 * shorter for longer, shorter in itertools.pairwise(lengths))
