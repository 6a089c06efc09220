"""Finds rows that are in two data sets: training data must not contain the prompts of the evaluation. The overlap of
two texts is the share of one's runs of ``NGRAM`` words that are also in the other (Brown et al. 2020 used 13 words;
short prompts have fewer). Case and punctuation are ignored. In scripts that are written without spaces, each character
counts as a word."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from alignment.config.data import OnError, SourceConfig
from alignment.core.wording import WITHOUT_SPACES, spaced_word, unified
from alignment.data.formats.plain import TEXT
from alignment.data.reading import iterate
from alignment.data.reading import start as start_reading
from alignment.data.records import HeldOutPrompt, PlainText, Record

NGRAM = 8
LIKELY = 0.5
"""Overlap from which a row is reported."""
_ASCII_WORD = re.compile(r"\w+")
"""Finds the same words as ``_word`` in text of ASCII alone, seven times as fast."""


@cache
def _word() -> re.Pattern[str]:
    return re.compile(rf"[{WITHOUT_SPACES}]|{spaced_word()}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LocatedText:
    """A text and the location of its row; ``author`` is the person whose opinion the row is, if it names one."""

    where: str
    text: str
    author: str = ""


def asked(record: Record) -> LocatedText:
    """The question of a record: its user turns, those that an evaluation asks later too, or its text."""
    turns = [turn.content for turn in getattr(record, "messages", ()) if turn.role == "user"]
    turns += getattr(record, "later_turns", ())
    return LocatedText(where=record.where, text="\n".join(turns) or getattr(record, "text", ""))


def asked_in(path: Path, data: SourceConfig) -> Iterator[LocatedText]:
    """The questions of a source's prompts, or its texts if it has the format of plain text; rows without are skipped.
    Raises DataError: the source has no rows, or no row has the columns of a known format; or, while it is read, no row
    has a prompt."""
    lenient = replace(data, on_error=OnError.skip, max_skipped=1.0)
    reading = start_reading(path, lenient)
    record: type[Any] = PlainText if reading.format is TEXT else HeldOutPrompt
    return map(asked, iterate(path, record, lenient, reading=reading))


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """The row at ``learned`` contains the ``share`` of the runs of words of the row at ``held_out``."""

    learned: str
    held_out: str
    share: float


class HeldOut:
    """Texts that must not be learned. Only hashes of their runs of words are held in memory."""

    def __init__(self, texts: Iterable[LocatedText]) -> None:
        self._sizes: dict[str, int] = {}
        self._locations: dict[int, set[str]] = defaultdict(set)
        for located in texts:
            runs = set(_runs(located.text))
            self._sizes[located.where] = len(runs)
            for run in runs:
                self._locations[run].add(located.where)

    def overlaps(self, texts: Iterable[LocatedText]) -> Iterator[Overlap]:
        """Yields, for each text, the held-out text with the largest overlap, if that is at least ``LIKELY``. Of several
        with equal overlaps it is the one whose location comes first as text, so that every call names the same one."""
        for located in texts:
            if shares := self.shares(located.text):
                where, share = min(shares.items(), key=lambda item: (-item[1], item[0]))
                if share >= LIKELY:
                    yield Overlap(learned=located.where, held_out=where, share=share)

    def shares(self, text: str) -> dict[str, float]:
        """Per location of a held-out text, the share of its runs that are in ``text``; texts without any are left
        out."""
        shared = Counter(where for run in set(_runs(text)) for where in self._locations.get(run, ()))
        return {where: count / self._sizes[where] for where, count in shared.items()}


def asked_too(judged: Iterable[Record], learned: Iterable[Record]) -> set[str]:
    """The questions of ``judged`` records (``asked``) that also overlap with a learned record."""
    distinct = {asked(record).text for record in judged}
    held_out = HeldOut(LocatedText(where=text, text=text) for text in distinct)
    shares_of_rows = (held_out.shares(asked(record).text) for record in learned)
    return {text for shares in shares_of_rows for text, share in shares.items() if share >= LIKELY}


def _runs(text: str) -> Iterator[int]:
    words = (_ASCII_WORD if text.isascii() else _word()).findall(unified(text.lower()))
    for start in range(max(1, len(words) - NGRAM + 1)):
        run = words[start : start + NGRAM]
        if run:
            yield hash(tuple(run))
