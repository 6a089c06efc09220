"""Finds records that are equal to earlier ones, and rows that are nearly so, in one pass and little memory.

Eight bytes of each record are kept. Rows wait until there are some thousands of them, because a batch of keys is looked
up much faster than its keys one by one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b

import numpy as np

from alignment.core.fingerprint import canonical
from alignment.data.key_set import KeySet
from alignment.data.near_duplicates import NearDuplicates
from alignment.data.overlap import LocatedText
from alignment.data.records import Conversation, LabelledAnswer, PlainText, PreferencePair, Prompt, Record

BATCH = 4_096
"""Rows that wait."""
BATCH_CHARACTERS = 1 << 24
"""Characters of waiting rows; a single row may have as many."""
_FULLEST: tuple[type[Record], ...] = (PreferencePair, LabelledAnswer, Conversation, Prompt, PlainText)
"""Records, those that use most of a row first."""
_TEXTS = ("text", "chosen", "rejected", "answer")
"""Fields of records that hold a text beside their turns."""

Keyed = Mapping[int, Record]
"""Records by their keys."""


def record_key(record: Record) -> int:
    """64 bits that are equal for records with equal content."""
    turns = [
        (turn.role, turn.content, turn.thought, canonical(list(turn.tool_calls)) if turn.tool_calls else ())
        for turn in getattr(record, "messages", ())
    ]
    texts = [getattr(record, name, "") for name in _TEXTS]
    content = (turns, texts, getattr(record, "desirable", None), getattr(record, "later_turns", ()))
    return int.from_bytes(blake2b(repr(content).encode(), digest_size=8).digest())


class RepeatedRecords:
    """Counts repeated records by stage in ``counts``, and passes the text of rows with a new record to ``near``.

    ``records`` names the record that each stage makes of a row.
    """

    def __init__(self, records: Mapping[str, type[Record]], near: NearDuplicates) -> None:
        self.counts = dict.fromkeys(records, 0)
        self._records = records
        self._near = near
        self._seen = {name: KeySet() for name in records}
        self._wait()

    def _wait(self) -> None:
        self._keys = {name: array("Q") for name in self._records}
        self._rows = {name: array("L") for name in self._records}
        self._waiting: list[tuple[str, Mapping[str, Keyed]] | None] = []
        self._characters = 0

    def add(self, where: str, records: Mapping[str, Sequence[Record]], *, size: int) -> None:
        """The records that stages made of the next row, which has ``size`` characters."""
        keyed = {name: {record_key(record): record for record in of_stage} for name, of_stage in records.items()}
        for name, of_stage in keyed.items():
            self._keys[name].extend(of_stage)
            self._rows[name].extend([len(self._waiting)] * len(of_stage))
        self._waiting.append(None if self._near.is_full else (where, keyed))
        self._characters += size
        if len(self._waiting) >= BATCH or self._characters >= BATCH_CHARACTERS:
            self.end()

    def end(self) -> None:
        """Looks at the rows that wait."""
        new: list[dict[str, list[int]]] = [{} for _ in self._waiting]
        with_new = np.zeros(len(self._waiting), dtype=np.bool_)
        for name, keys in self._keys.items():
            rows = np.array(self._rows[name], dtype=np.int64)
            is_new = self._seen[name].add(np.array(keys, dtype=np.uint64))
            self.counts[name] += int((~is_new).sum())
            with_new[rows[is_new]] = True
            if not self._near.is_full:
                for index in np.flatnonzero(is_new):
                    new[rows[index]].setdefault(name, []).append(keys[index])
        for waiting, keys_of_row, has_new in zip(self._waiting, new, with_new.tolist(), strict=True):
            if waiting is None:
                self._near.passed_over += has_new
            elif has_new:
                where, keyed = waiting
                made = {name: [keyed[name][key] for key in keys] for name, keys in keys_of_row.items()}
                self._near.add(LocatedText(where=where, text=self._text_of(made)))
        self._wait()

    def _text_of(self, made: Mapping[str, Iterable[Record]]) -> str:
        """The text of a row's new records, read by the stage that uses most of the row.

        System turns are left out: many rows share one, which alone would make them near duplicates.
        """
        by_record = {self._records[name]: of_stage for name, of_stage in made.items()}
        records = next((by_record[record] for record in _FULLEST if record in by_record), ())
        texts: list[str] = []
        for record in records:
            texts += [message.content for message in getattr(record, "messages", ()) if message.role != "system"]
            texts += [getattr(record, name, "") for name in _TEXTS]
            texts += getattr(record, "later_turns", ())
        return "\n".join(dict.fromkeys(texts))
