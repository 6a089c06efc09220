"""Rows that stand in two data sets: what is learned must not be what is asked in the evaluation.

Two texts overlap by the share of one's runs of ``NGRAM`` words that stand in the other too (Brown et al. 2020 looked at
13 words; short prompts have fewer). Case and punctuation do not count.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.config.data import OnError, SourceConfig
from alignment.data.reading import iterate
from alignment.data.records import Prompt, Record

NGRAM = 8
LIKELY = 0.5
"""Share from which a row is reported."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """A text and where it stands."""

    where: str
    text: str


def asked(record: Record) -> Placed:
    """What a record asks: what its user turns say, or its text."""
    turns = [turn.content for turn in getattr(record, "messages", ()) if turn.role == "user"]
    return Placed(where=record.where, text="\n".join(turns) or getattr(record, "text", ""))


def asked_in(path: Path, data: SourceConfig) -> Iterator[Placed]:
    """What the prompts of a source ask; rows without one are passed over."""
    lenient = replace(data, on_error=OnError.skip, max_skipped=1.0)
    return map(asked, iterate(path, Prompt, lenient))


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """``share`` of the runs of words of the row at ``held_out`` stand in the one at ``learned``."""

    learned: str
    held_out: str
    share: float


class HeldOut:
    """Texts that must not be learned. Only their runs of words are kept in memory."""

    def __init__(self, texts: Iterable[Placed]) -> None:
        self._sizes: dict[str, int] = {}
        self._places: dict[int, set[str]] = defaultdict(set)
        for placed in texts:
            runs = set(_runs(placed.text))
            self._sizes[placed.where] = len(runs)
            for run in runs:
                self._places[run].add(placed.where)

    def overlaps(self, texts: Iterable[Placed]) -> Iterator[Overlap]:
        """For each text the held-out one with which it has most in common, if that is ``LIKELY`` enough."""
        for placed in texts:
            shares = self.shares(placed.text)
            if shares and (best := max(shares.items(), key=lambda item: item[1]))[1] >= LIKELY:
                yield Overlap(learned=placed.where, held_out=best[0], share=best[1])

    def shares(self, text: str) -> dict[str, float]:
        """For each held-out text, by its place, the share of its runs that stand in ``text``; without those at 0."""
        shared = Counter(where for run in set(_runs(text)) for where in self._places.get(run, ()))
        return {where: count / self._sizes[where] for where, count in shared.items()}


def asked_too(judged: Iterable[Record], learned: Iterable[Record]) -> set[str]:
    """What of all that is asked of ``judged`` records, as ``asked`` gives it, a learned one asks too."""
    distinct = {asked(record).text for record in judged}
    held_out = HeldOut(Placed(where=text, text=text) for text in distinct)
    told = (held_out.shares(asked(record).text) for record in learned)
    return {text for shares in told for text, share in shares.items() if share >= LIKELY}


def _runs(text: str) -> Iterator[int]:
    """Hashes of all runs of ``NGRAM`` words; a shorter text is one run."""
    words = _WORD.findall(text.lower())
    for start in range(max(1, len(words) - NGRAM + 1)):
        run = words[start : start + NGRAM]
        if run:
            yield hash(tuple(run))
