"""``votes.jsonl``: what people preferred, one vote per line. Each vote is bound to the prompt and the two answers that
were shown.

A line has the prompt and both answers, so it can be read without the evaluation, also as training data
(``alignment/data/formats/conversations.py``). A vote counts once its line is complete: a killed writer may leave an
incomplete one.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.core import typed_json
from alignment.core.errors import ArtifactError, DataError
from alignment.core.files import flush, naming, parse_json, write_text
from alignment.core.fingerprint import digest

FILE = "votes.jsonl"
TIE = "tie"
"""What ``preferred`` holds where neither answer is better; no arm has this name."""
_REMEDY = "fix the line or remove it; `align judge` writes each vote as one line of JSON"


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote:
    """An annotator's preference between the answers of two arms to one prompt.

    ``answers`` are by arm, ``preferred`` is one of these arms or ``TIE``, and ``shown_first`` is the arm whose answer
    stood first. ``pair`` is ``pair_key`` of the prompt and the answers. ``time`` is in UTC, ISO 8601. Example:
    ``Vote(pair="9f86…", annotator="ada", messages=[{"role": "user", "content": "2 + 2?"}], answers={"stage:dpo": "4.",
    "stage:sft": "5."}, preferred="stage:dpo", shown_first="stage:sft")``."""

    pair: str
    annotator: str
    messages: list[dict[str, Any]]
    answers: dict[str, str]
    preferred: str
    shown_first: str
    id: str = ""
    task: str = ""
    time: str = ""
    version: int = 1

    @property
    def line(self) -> str:
        return json.dumps(typed_json.to_json(self), ensure_ascii=False)

    def points(self, arm: str) -> float:
        """1 if ``arm`` is preferred, .5 for a tie, 0 if the other arm is."""
        return 0.5 if self.preferred == TIE else float(self.preferred == arm)


def pair_key(messages: Sequence[Mapping[str, Any]], answers: Mapping[str, str]) -> str:
    """What identifies a prompt with two answers, whichever arm is named first: 32 hexadecimal digits."""
    return digest([[dict(message) for message in messages], sorted(answers.items())])[:32]


def read_votes(path: Path) -> list[Vote]:
    """All votes of a file, in the order in which they were given; empty if there is no file. Raises DataError: a line
    is not a vote, was changed after it was written, or repeats a vote; names the line."""
    votes = []
    first: dict[tuple[str, str], int] = {}
    for number, line in enumerate(written_lines(path), start=1):
        if not line.strip():
            continue
        vote = _parsed(line, where=f"{path}:{number}")
        earlier = first.setdefault(_owner(vote), number)
        if earlier != number:
            raise DataError(
                f"{vote.annotator!r} voted a second time on the answers of line {earlier}",
                where=f"{path}:{number}",
                remedy="remove one of the two lines",
            )
        votes.append(vote)
    return votes


def written_lines(path: Path) -> list[str]:
    """The lines that have ended; empty if there is no file. Raises DataError: the file is not UTF-8."""
    try:
        *lines, _unfinished = path.read_bytes().decode().split("\n")
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error.reason}", where=str(path), remedy="restore the file") from error
    return lines


def append_vote(path: Path, vote: Vote) -> None:
    """Adds a vote; when this returns, the vote is on the disk. If it fails, the file is as it was. Raises OSError: the
    file cannot be written to."""
    content = f"{vote.line}\n".encode()
    is_new = not path.exists()
    with naming(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            before = os.fstat(descriptor).st_size
            try:
                if os.write(descriptor, content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                os.fsync(descriptor)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)
    if is_new:
        flush(path.parent)


def remove_vote(path: Path, vote: Vote) -> None:
    """Takes a vote out of the file by one rename; all other lines stay as they are. Raises OSError: the file cannot be
    written to; DataError: a line is not a vote."""
    others = [
        line
        for number, line in enumerate(written_lines(path), start=1)
        if not line.strip() or _owner(_parsed(line, where=f"{path}:{number}")) != _owner(vote)
    ]
    write_text(path, "".join(f"{line}\n" for line in others), durable=True)
    flush(path.parent)


def _owner(vote: Vote) -> tuple[str, str]:
    """What no two votes of a file share."""
    return vote.annotator, vote.pair


def _parsed(line: str, *, where: str) -> Vote:
    try:
        vote = typed_json.strict(parse_json(line), Vote, where=where, remedy=_REMEDY)
    except ValueError as error:
        raise DataError(f"not JSON: {error}", where=where, remedy=_REMEDY) from error
    except ArtifactError as error:
        raise DataError(error.message, where=where, remedy=error.remedy) from error
    if problem := _problem(vote):
        raise DataError(problem, where=where, remedy=_REMEDY)
    return vote


def _problem(vote: Vote) -> str:
    if len(vote.answers) != 2:
        return f"'answers' must have the answers of two arms; it has {len(vote.answers)}"
    if vote.preferred not in (*vote.answers, TIE):
        return f"'preferred' must be one of {', '.join([*vote.answers, TIE])}; it is {vote.preferred!r:.60}"
    if vote.shown_first not in vote.answers:
        return f"'shown_first' must be one of {', '.join(vote.answers)}; it is {vote.shown_first!r:.60}"
    if pair_key(vote.messages, vote.answers) != vote.pair:
        return "the prompt or an answer differs from what was voted on: 'pair' is the hash of other texts"
    return ""
