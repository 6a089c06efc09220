"""The votes on two arms while people judge: which pair comes next for whom, and what is refused."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

from alignment.evaluation.answer_pairs import AnswerPair, queue, shown_first
from alignment.records.votes import TIE, Vote, append_vote, read_votes, remove_vote

LONGEST_NAME = 40


class Choice(str, Enum):
    """What an annotator says of a pair, by the key for it: the answer shown first or second, or neither."""

    first = "1"
    second = "2"
    tie = "0"


class Refused(Exception):
    """A vote or an undo that cannot be taken; nothing was written. ``status`` is the one of HTTP."""

    def __init__(self, message: str, *, status: int = 409) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How far an annotator is: ``pair`` is the next one, with its ``answers`` in the order shown; None once all
    ``total`` are judged."""

    annotator: str
    judged: int
    total: int
    pair: AnswerPair | None
    answers: tuple[str, ...]


class Ballots:
    """The pairs of an evaluation's two arms, with the votes in ``file``."""

    def __init__(self, file: Path, pairs: Sequence[AnswerPair], arms: tuple[str, str]) -> None:
        """Raises DataError if the file holds something else than votes."""
        ordered = queue(pairs)
        self._file = file
        self._pairs = {pair.key: pair for pair in ordered if not pair.same}
        self._votes = read_votes(file)
        self.num_same = len(ordered) - len(self._pairs)
        self.num_prompts = sum(not pair.same for pair in pairs)  # with different answers; a prompt may repeat
        about = [vote for vote in self._votes if set(vote.answers) == set(arms)]
        self.num_stale = sum(vote.pair not in self._pairs for vote in about)

    @property
    def total(self) -> int:
        """The number of pairs that each annotator judges."""
        return len(self._pairs)

    def judged(self) -> dict[str, int]:
        """The number of pairs that each annotator has judged, in the order of the first votes."""
        return dict(Counter(vote.annotator for vote in self._votes if vote.pair in self._pairs))

    def standing(self, annotator: str) -> Standing:
        """How far the annotator is, and the next pair."""
        judged = {vote.pair for vote in self._own(annotator)}
        pair = next((pair for key, pair in self._pairs.items() if key not in judged), None)
        answers = () if pair is None else tuple(pair.answers[arm] for arm in _shown(pair, annotator))
        return Standing(annotator=annotator, judged=len(judged), total=self.total, pair=pair, answers=answers)

    def vote(self, annotator: str, key: str, choice: Choice) -> None:
        """Stores a vote; when this returns, it is on the disk. Raises Refused: there is no such pair, or the annotator
        has judged it already; OSError: the file cannot be written to, and no part of the vote is in it."""
        pair = self._pairs.get(key)
        if pair is None:
            raise Refused("There is no such pair in this evaluation.", status=404)
        if any(vote.pair == key for vote in self._own(annotator)):
            raise Refused(f"{annotator} has judged this pair already. Undo that vote first.")
        first, second = _shown(pair, annotator)
        vote = Vote(
            pair=key,
            annotator=annotator,
            messages=pair.messages,
            answers=pair.answers,
            preferred={Choice.first: first, Choice.second: second, Choice.tie: TIE}[choice],
            shown_first=first,
            id=pair.id,
            task=pair.task,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        append_vote(self._file, vote)
        self._votes.append(vote)

    def undo(self, annotator: str) -> None:
        """Takes the annotator's last vote back. Raises Refused: there is none; OSError: the file cannot be written to,
        and the vote is still there; DataError: somebody else has written to the file, and not votes."""
        own = self._own(annotator)
        if not own:
            raise Refused(f"{annotator} has no vote to undo.")
        remove_vote(self._file, own[-1])
        self._votes.remove(own[-1])

    def _own(self, annotator: str) -> list[Vote]:
        """The annotator's votes on these pairs, in the order in which they were given."""
        return [vote for vote in self._votes if vote.annotator == annotator and vote.pair in self._pairs]


def annotator_name(text: str) -> str:
    """The name without superfluous spaces. Raises ValueError: it is empty, too long, or holds characters that cannot be
    printed."""
    name = unicodedata.normalize("NFC", " ".join(text.split()))
    if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise ValueError(f"a name must have 1 to {LONGEST_NAME} printable characters")
    return name


def _shown(pair: AnswerPair, annotator: str) -> tuple[str, str]:
    """The arms in the order in which the annotator sees them."""
    first = shown_first(pair, annotator)
    return first, next(arm for arm in pair.answers if arm != first)
