"""Rows that say nearly the same as an earlier one, found in one pass.

A text counts as the set of its runs of ``RUN`` words; two are as alike as the share of their runs that both have
(Jaccard). MinHash with locality-sensitive hashing (Leskovec et al. 2014, chapter 3) says which pairs to look at; these
are counted exactly. Case does not count. A script without spaces is one long word, so near repeats in it are not seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from alignment.data.overlap import Placed

RUN = 2
"""Words. One changed word of thirty leaves .87 of the runs of two, and .68 of the runs of five that are usual for web
pages; of ten words it leaves .64, so short texts must be the same but for case."""
ALIKE = 0.8
"""Share from which two texts are nearly the same (SlimPajama, Soboleva et al. 2023)."""
BANDS, ROWS = 16, 8
"""Two texts that share .8 are compared with a chance of 95 %, at .87 of 99.8 %, and at .5 of 6 %. Chosen, not tuned."""
SEED = 1
"""The same file gives the same answer."""
TEXTS = 50_000
"""Texts that are looked at: about half a minute, and some kilobytes of memory for each."""
COMPARISONS = 1_000_000
"""After so many no more texts are looked at: where all are half alike, each is compared with many others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NearRepeat:
    """``share`` of the runs of words of the rows at ``where`` and ``earlier`` stand in both."""

    where: str
    earlier: str
    share: float


class NearRepeats:
    """Takes texts one by one. ``found`` has a text whose like came before, with the one that is most like it."""

    def __init__(self) -> None:
        self.found: list[NearRepeat] = []
        self.looked_at = 0
        self.passed_over = 0
        self._comparisons = 0
        self._empty = MinHash(num_perm=BANDS * ROWS, seed=SEED, hashfunc=int)
        self._index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
        self._kept: list[tuple[str, NDArray[np.uint32]]] = []

    def add(self, text: Placed) -> None:
        """Holds the text against those before it. Texts that are exactly the same as an earlier one should not come
        here; of several that are alike only the first is kept for the ones behind."""
        if not text.text.strip():
            return
        if self.looked_at >= TEXTS or self._comparisons >= COMPARISONS:
            self.passed_over += 1
            return
        self.looked_at += 1
        runs = _runs(text.text)
        sketch = self._empty.copy()
        sketch.update_batch(runs.tolist())
        nearest = self._nearest(runs, sketch)
        if nearest is not None and nearest[0] >= ALIKE:
            self.found.append(NearRepeat(where=text.where, earlier=self._kept[nearest[1]][0], share=nearest[0]))
        else:
            self._index.insert(len(self._kept), sketch)
            self._kept.append((text.where, runs))

    def _nearest(self, runs: NDArray[np.uint32], sketch: Any) -> tuple[float, int] | None:
        """Share and number of the kept text that is most like this one; of equals the first."""
        candidates = sorted(self._index.query(sketch))
        self._comparisons += len(candidates)
        shares = [(_share(runs, self._kept[number][1]), number) for number in candidates]
        return max(shares, key=lambda found: found[0], default=None)


def _runs(text: str) -> NDArray[np.uint32]:
    """Hashes of the runs of words, each once, in order of size; a shorter text is one run."""
    words = text.lower().split()
    starts = range(max(1, len(words) - RUN + 1))
    runs = (" ".join(words[start : start + RUN]).encode(errors="surrogatepass") for start in starts)
    return np.unique(np.array([crc32(run) for run in runs], dtype=np.uint32))


def _share(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> float:
    both = np.intersect1d(one, other, assume_unique=True).size
    return both / (one.size + other.size - both)
