"""Records that are there twice or nearly so."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any
from zlib import crc32

import numpy as np
from datasketch import MinHash
from numpy.typing import NDArray

from alignment.core.wording import divided, unified
from alignment.data.overlap import LocatedText
from alignment.data.records import Conversation, LabelledAnswer, PlainText, PreferencePair, Prompt, Record

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
        """Compares the text with those before it. Exact duplicates should be removed before. Of several near duplicates
        only the first is compared with later texts."""
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
        numbers: list[int] = (sketch.reshape(BANDS, ROWS) * self._factors).sum(axis=1, dtype=np.uint64).tolist()
        return numbers

    def add(self, bands: list[int]) -> None:
        for number, latest in zip(bands, self._latest, strict=True):
            self._before.append(latest.get(number, -1))
            latest[number] = self._num_texts
        self._num_texts += 1

    def candidates(self, bands: list[int]) -> list[int]:
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


BATCH = 4_096
"""Rows that wait."""
BATCH_CHARACTERS = 1 << 24
"""Characters of waiting rows; a single row may have as many."""
HELD = 20
"""Rows of each kind that are named; the others are counted."""
_FULLEST: tuple[type[Record], ...] = (PreferencePair, LabelledAnswer, Conversation, Prompt, PlainText)
"""Records, those that use most of a row first."""
_TEXTS = ("text", "chosen", "rejected", "answer")
"""Fields of records that hold a text beside their turns."""
_OTHERS = ("desirable", "later_turns", "choices", "right")
"""Further fields by which records differ."""

Keyed = Mapping[int, Record]
"""Records by their keys."""


def record_key(record: Record) -> int:
    """64 bits that are equal for records with equal content."""
    turns = [
        (turn.role, turn.content, turn.thought, turn.learned, _canonical(_without_ids(turn.tool_calls)))
        for turn in getattr(record, "messages", ())
    ]
    texts = [getattr(record, name, "") for name in _TEXTS]
    others = [getattr(record, name, None) for name in _OTHERS]
    content = (turns, texts, others, _canonical(getattr(record, "tools", ())))
    return int.from_bytes(blake2b(repr(content).encode(), digest_size=8).digest())


def _without_ids(calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Calls of two copies of a row may have other ids."""
    return [{name: value for name, value in call.items() if name != "id"} for call in calls]


def _canonical(tools: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(tools, sort_keys=True, default=str) if tools else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RelatedRow:
    """A row at ``where`` that repeats or contradicts the row at ``earlier``, which is empty if it is no longer known.
    ``record`` is the record of the stage that uses most of the row."""

    where: str
    earlier: str
    record: type[Record]


@dataclass(kw_only=True)
class RowRelations:
    """Rows that repeat an earlier row exactly, and rows that say the opposite of an earlier row: a pair whose chosen
    answer the earlier row rejects, or the same answer with the other label. The lists hold the first ``HELD`` rows."""

    num_exact: int = 0
    exact: list[RelatedRow] = field(default_factory=list)
    num_contradictions: int = 0
    contradictions: list[RelatedRow] = field(default_factory=list)

    def add_exact(self, row: RelatedRow) -> None:
        self.num_exact += 1
        self.exact += [row] if len(self.exact) < HELD else []

    def add_contradiction(self, row: RelatedRow) -> None:
        self.num_contradictions += 1
        self.contradictions += [row] if len(self.contradictions) < HELD else []


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fullest:
    """The keys of a row's records for the stage that uses most of it, and of the records that would contradict them.
    Rows of different authors are not compared, because people may agree or disagree."""

    where: str
    author: str
    stage: str
    keys: Sequence[int]
    opposites: Sequence[int]


class RepeatedRecords:
    """Counts repeated records by stage in ``counts``, and passes the text of rows with a new record to ``near``.
    ``records`` names the record that each stage makes of a row. ``related`` are the rows that repeat or contradict an
    earlier one. Contradictions are looked for among the first ``TEXTS`` different records."""

    def __init__(self, records: Mapping[str, type[Record]], near: NearDuplicates) -> None:
        self.counts = dict.fromkeys(records, 0)
        self._records = records
        self._near = near
        self._seen = {name: KeySet() for name in records}
        self.related = RowRelations()
        self._by_fullness = [name for record in _FULLEST for name, own in records.items() if own is record]
        self._first: dict[tuple[str, int], str] = {}
        self._wait()

    def _wait(self) -> None:
        self._keys = {name: array("Q") for name in self._records}
        self._rows = {name: array("L") for name in self._records}
        self._waiting: list[tuple[str, str, Mapping[str, Keyed]] | None] = []
        self._fullest: list[_Fullest | None] = []
        self._characters = 0

    def add(self, where: str, records: Mapping[str, Sequence[Record]], *, size: int, author: str = "") -> None:
        """The records that stages made of the next row, which has ``size`` characters and perhaps an ``author``."""
        keyed = {name: {record_key(record): record for record in of_stage} for name, of_stage in records.items()}
        for name, of_stage in keyed.items():
            self._keys[name].extend(of_stage)
            self._rows[name].extend([len(self._waiting)] * len(of_stage))
        self._waiting.append(None if self._near.is_full else (where, author, keyed))
        self._fullest.append(self._fullest_of(where, author, keyed))
        self._characters += size
        if len(self._waiting) >= BATCH or self._characters >= BATCH_CHARACTERS:
            self.end()

    def end(self) -> None:
        """Looks at the rows that wait."""
        new: list[dict[str, list[int]]] = [{} for _ in self._waiting]
        with_new = np.zeros(len(self._waiting), dtype=np.bool_)
        new_rows: dict[str, NDArray[np.bool_]] = {}
        for name, keys in self._keys.items():
            rows = np.array(self._rows[name], dtype=np.int64)
            is_new = self._seen[name].add(np.array(keys, dtype=np.uint64))
            self.counts[name] += int((~is_new).sum())
            new_rows[name] = np.zeros(len(self._waiting), dtype=np.bool_)
            new_rows[name][rows[is_new]] = True
            with_new |= new_rows[name]
            if not self._near.is_full:
                for at in np.flatnonzero(is_new):
                    new[rows[at]].setdefault(name, []).append(keys[at])
        contradicting = self._relate(new_rows)
        for index, (waiting, keys_of_row, has_new) in enumerate(
            zip(self._waiting, new, with_new.tolist(), strict=True)
        ):
            if index in contradicting:
                continue
            if waiting is None:
                self._near.passed_over += has_new
            elif has_new:
                where, author, keyed = waiting
                made = {name: [keyed[name][key] for key in keys] for name, keys in keys_of_row.items()}
                self._near.add(LocatedText(where=where, text=self._text_of(made), author=author))
        self._wait()

    def _fullest_of(self, where: str, author: str, keyed: Mapping[str, Keyed]) -> _Fullest | None:
        stage = next((name for name in self._by_fullness if keyed.get(name)), None)
        if stage is None:
            return None
        opposites = (
            ()
            if self._is_full
            else [record_key(opposite) for opposite in map(_opposite, keyed[stage].values()) if opposite]
        )
        return _Fullest(where=where, author=author, stage=stage, keys=list(keyed[stage]), opposites=opposites)

    @property
    def _is_full(self) -> bool:
        return len(self._first) >= TEXTS

    def _relate(self, new_rows: Mapping[str, NDArray[np.bool_]]) -> set[int]:
        """Notes which of the waiting rows repeat or contradict an earlier row; returns the indices of the latter."""
        contradicting = set()
        for index, row in enumerate(self._fullest):
            if row is None:
                continue
            record = self._records[row.stage]
            earlier = [self._first.get((row.author, key), "") for key in row.keys]
            if all(earlier) or (not row.author and not new_rows[row.stage][index]):
                most = max(earlier, key=earlier.count)  # the row with most of this row's records
                self.related.add_exact(RelatedRow(where=row.where, earlier=most, record=record))
                continue
            opposite = next(filter(None, (self._first.get((row.author, key)) for key in row.opposites)), None)
            if opposite is not None:
                contradicting.add(index)
                self.related.add_contradiction(RelatedRow(where=row.where, earlier=opposite, record=record))
            for key in row.keys if not self._is_full else ():
                self._first.setdefault((row.author, key), row.where)
        return contradicting

    def _text_of(self, made: Mapping[str, Iterable[Record]]) -> str:
        """The text of a row's new records, read by the stage that uses most of the row. System turns are left out: many
        rows share one, which alone would make them near duplicates."""
        by_record = {self._records[name]: of_stage for name, of_stage in made.items()}
        records = next((by_record[record] for record in _FULLEST if record in by_record), ())
        texts: list[str] = []
        for record in records:
            texts += [message.content for message in getattr(record, "messages", ()) if message.role != "system"]
            texts += [getattr(record, name, "") for name in _TEXTS]
            texts += getattr(record, "later_turns", ())
        return "\n".join(dict.fromkeys(texts))


def _opposite(record: Record) -> Record | None:
    """The record that contradicts this one; None if this kind of record states no preference."""
    if isinstance(record, PreferencePair):
        return replace(record, chosen=record.rejected, rejected=record.chosen)
    if isinstance(record, LabelledAnswer):
        return replace(record, desirable=not record.desirable)
    return None
