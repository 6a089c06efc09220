"""Finds rows whose text is nearly the same as an earlier row's, in one pass.

A text is represented by its set of runs of ``RUN`` words. The similarity of two texts is the share of all their runs
that both have (Jaccard). MinHash with locality-sensitive hashing (Leskovec et al. 2014, chapter 3) proposes pairs,
whose similarity is then computed exactly. Case is ignored. In scripts without spaces, each character is a word.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from datasketch import MinHash
from numpy.typing import NDArray

from alignment.core.wording import divided, unified
from alignment.data.overlap import LocatedText

RUN = 2
"""Words in a run. If one word of thirty changes, .87 of the runs of two stay, and .68 of the runs of five, which are
usual for web pages. In a text of ten words .64 of the runs stay, so short texts must be equal except for case."""
ALIKE = 0.8
"""Similarity from which two texts are near duplicates (SlimPajama, Soboleva et al. 2023)."""
BANDS, ROWS = 16, 8
"""Two texts of similarity .8 are compared with a probability of 95 %; at .87 it is 99.8 %, at .5 it is 6 %. Chosen, not
tuned."""
SEED = 1
"""Fixed, so that the same file always gives the same result."""
TEXTS = 50_000
"""Texts that are compared at most: about half a minute, and two kilobytes of memory for each."""
COMPARISONS = 1_000_000
"""Comparisons after which no more texts are taken: if all are half alike, each is compared with many others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NearDuplicate:
    """Rows at ``where`` and ``earlier`` that have the ``share`` of their runs of words in common."""

    where: str
    earlier: str
    share: float


class NearDuplicates:
    """Takes texts one by one. ``pairs`` holds each near duplicate with the earlier text that is most similar to it."""

    def __init__(self) -> None:
        self.pairs: list[NearDuplicate] = []
        self.looked_at = 0
        self.passed_over = 0
        self._comparisons = 0
        self._empty = MinHash(num_perm=BANDS * ROWS, seed=SEED, hashfunc=int)
        self._index = _Bands()
        self._compared: list[tuple[LocatedText, NDArray[np.uint32]]] = []

    @property
    def is_full(self) -> bool:
        """Whether no more texts are compared."""
        return self.looked_at >= TEXTS or self._comparisons >= COMPARISONS

    def add(self, located: LocatedText) -> None:
        """Compares the text with those before it.

        Exact duplicates should be removed before. Of several near duplicates only the first is compared with later
        texts.
        """
        if not located.text.strip():
            return
        if self.is_full:
            self.passed_over += 1
            return
        self.looked_at += 1
        runs = _runs(located.text)
        sketch = self._empty.copy()
        sketch.update_batch(runs.tolist())
        bands = self._index.of(sketch.hashvalues)
        nearest = self._nearest(runs, bands, author=located.author)
        if nearest is not None and nearest[0] >= ALIKE:
            self.pairs.append(
                NearDuplicate(where=located.where, earlier=self._compared[nearest[1]][0].where, share=nearest[0])
            )
        else:
            self._index.add(bands)
            self._compared.append((located, runs))

    def _nearest(self, runs: NDArray[np.uint32], bands: list[int], *, author: str) -> tuple[float, int] | None:
        """Similarity and number of the same author's earlier text that is most similar; the first among equals."""
        candidates = [number for number in self._index.candidates(bands) if self._compared[number][0].author == author]
        self._comparisons += len(candidates)
        shares = [(_share(runs, self._compared[number][1]), number) for number in candidates]
        return max(shares, key=lambda candidate: candidate[0], default=None)


class _Bands:
    """Texts, numbered as they are added, by the bands of their sketches; a chain leads from a text to the one before it
    with an equal band. datasketch's index does the same with five times the memory."""

    def __init__(self) -> None:
        self._factors = np.random.default_rng(SEED).integers(2**64, size=(BANDS, ROWS), dtype=np.uint64) | np.uint64(1)
        self._latest: list[dict[int, int]] = [{} for _ in range(BANDS)]
        self._before = array("l")
        self._num_texts = 0

    def of(self, sketch: NDArray[np.uint64]) -> list[int]:
        """A number for each band of a sketch; equal bands have equal numbers."""
        numbers: list[int] = (sketch.reshape(BANDS, ROWS) * self._factors).sum(axis=1, dtype=np.uint64).tolist()
        return numbers

    def add(self, bands: list[int]) -> None:
        """Adds the next text."""
        for number, latest in zip(bands, self._latest, strict=True):
            self._before.append(latest.get(number, -1))
            latest[number] = self._num_texts
        self._num_texts += 1

    def candidates(self, bands: list[int]) -> list[int]:
        """The texts with a band equal to one of these, in order."""
        texts = set()
        for band, (number, latest) in enumerate(zip(bands, self._latest, strict=True)):
            text = latest.get(number, -1)
            while text >= 0:
                texts.add(text)
                text = self._before[text * BANDS + band]
        return sorted(texts)


def _runs(text: str) -> NDArray[np.uint32]:
    """Sorted, distinct hashes of the runs of words; a shorter text is one run."""
    words = divided(unified(text.lower()))
    starts = range(max(1, len(words) - RUN + 1))
    runs = (" ".join(words[start : start + RUN]).encode(errors="surrogatepass") for start in starts)
    return np.unique(np.array([crc32(run) for run in runs], dtype=np.uint32))


def _share(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> float:
    both = np.intersect1d(first, second, assume_unique=True).size
    return both / (first.size + second.size - both)
