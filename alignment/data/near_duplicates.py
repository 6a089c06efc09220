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
    words = divided(unified(text.lower()))
    starts = range(max(1, len(words) - RUN + 1))
    runs = (" ".join(words[start : start + RUN]).encode(errors="surrogatepass") for start in starts)
    return np.unique(np.array([crc32(run) for run in runs], dtype=np.uint32))


def _share(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> float:
    both = np.intersect1d(first, second, assume_unique=True).size
    return both / (first.size + second.size - both)


HELD = 20
"""Rows of each kind that are named; the others are counted."""
_FULLEST: tuple[type[Record], ...] = (PreferencePair, LabelledAnswer, Conversation, Prompt, PlainText)
"""Records, those that use most of a row first."""
_TEXTS = ("text", "chosen", "rejected", "answer")
"""Fields of records that hold a text beside their turns."""
_OTHERS = ("desirable", "later_turns", "choices", "right")
"""Further fields by which records differ."""


def record_key(record: Record) -> int:
    """64 bits that are equal for records with equal content."""
    turns = [
        (turn.role, turn.content, turn.thought, turn.learned, _canonical(turn.tool_calls))
        for turn in getattr(record, "messages", ())
    ]
    texts = [getattr(record, name, "") for name in _TEXTS]
    others = [getattr(record, name, None) for name in _OTHERS]
    content = (turns, texts, others, _canonical(getattr(record, "tools", ())))
    return int.from_bytes(blake2b(repr(content).encode(), digest_size=8).digest())


def _canonical(tools: Sequence[Mapping[str, Any]]) -> str:
    """Tools or calls as text, without the calls' ids, which differ between copies of a row."""
    bare = [{name: value for name, value in tool.items() if name != "id"} for tool in tools]
    return json.dumps(bare, sort_keys=True, default=str) if bare else ""


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


class RepeatedRecords:
    """Counts repeated records by stage in ``counts``, and passes the text of rows with a new record to ``near``.
    ``records`` names the record that each stage makes of a row. ``related`` are the rows that repeat or contradict an
    earlier one; rows of different authors are not compared, because people may agree or disagree. Contradictions are
    looked for among the first ``TEXTS`` different records."""

    def __init__(self, records: Mapping[str, type[Record]], near: NearDuplicates) -> None:
        self.counts = dict.fromkeys(records, 0)
        self._records = records
        self._near = near
        self._seen: dict[str, set[int]] = {name: set() for name in records}
        self.related = RowRelations()
        self._by_fullness = [name for record in _FULLEST for name, own in records.items() if own is record]
        self._first: dict[tuple[str, int], str] = {}

    def add(self, where: str, records: Mapping[str, Sequence[Record]], *, author: str = "") -> None:
        """The records that stages made of the next row, which perhaps has an ``author``."""
        keyed = {name: {record_key(record): record for record in of_stage} for name, of_stage in records.items()}
        made: dict[str, list[Record]] = {}
        for name, of_stage in keyed.items():
            new = [key for key in of_stage if key not in self._seen[name]]
            self.counts[name] += len(of_stage) - len(new)
            self._seen[name].update(new)
            made |= {name: [of_stage[key] for key in new]} if new else {}
        stage = next((name for name in self._by_fullness if keyed.get(name)), "")
        contradicts = bool(stage) and self._contradicts(where, author, stage, keyed[stage], is_new=stage in made)
        if made and not contradicts:
            self._near.add(LocatedText(where=where, text=self._text_of(made), author=author))

    def _contradicts(self, where: str, author: str, stage: str, keyed: Mapping[int, Record], *, is_new: bool) -> bool:
        """Whether the row contradicts an earlier one; notes that, or that it repeats one. ``keyed`` are its records for
        the ``stage`` that uses most of it."""
        record = self._records[stage]
        earlier = [self._first.get((author, key), "") for key in keyed]
        if all(earlier) or (not author and not is_new):
            most = max(earlier, key=earlier.count)  # the row with most of this row's records
            self.related.add_exact(RelatedRow(where=where, earlier=most, record=record))
            return False
        if len(self._first) >= TEXTS:
            return False
        opposites = (self._first.get((author, key)) for record in keyed.values() for key in _opposite_keys(record))
        opposite = next(filter(None, opposites), None)
        if opposite is not None:
            self.related.add_contradiction(RelatedRow(where=where, earlier=opposite, record=record))
        for key in keyed:
            self._first.setdefault((author, key), where)
        return opposite is not None

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


def _opposite_keys(record: Record) -> list[int]:
    if isinstance(record, PreferencePair):
        return [record_key(replace(record, chosen=record.rejected, rejected=record.chosen))]
    return [record_key(replace(record, desirable=not record.desirable))] if isinstance(record, LabelledAnswer) else []
