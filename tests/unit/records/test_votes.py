"""The file of votes: nothing that was confirmed is lost, and nothing that is not a vote is counted."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from alignment.core.errors import DataError
from alignment.core.files import cut_unfinished_line
from alignment.records import votes as file_of_votes
from alignment.records.votes import TIE, Vote, append_vote, pair_key, read_votes, remove_vote
from tests.judged import DPO, SFT, pair, vote

FIRST, SECOND = vote(pair(1)), vote(pair(2), TIE)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two votes."""
    path = tmp_path / "votes.jsonl"
    append_vote(path, FIRST)
    append_vote(path, SECOND)
    return path


def changed(line: str, **values: Any) -> str:
    return json.dumps({**json.loads(line), **values})


def refused(file: Path, *lines: str) -> str:
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_votes(file)
    assert caught.value.where.startswith(f"{file}:")
    return str(caught.value)


def test_votes_come_back_as_they_were_given(file: Path) -> None:
    assert read_votes(file) == [FIRST, SECOND]
    assert read_votes(file.with_name("none.jsonl")) == []


def test_texts_with_line_separators_stay_in_one_line(tmp_path: Path) -> None:
    odd = vote(pair(3, sft="a\u2028b\nc\x85d", dpo="“ok” 🙂"))
    append_vote(tmp_path / "votes.jsonl", odd)
    assert read_votes(tmp_path / "votes.jsonl") == [odd]


def test_points_are_of_the_arm_that_is_asked_about() -> None:
    assert [FIRST.points(DPO), FIRST.points(SFT), SECOND.points(DPO), SECOND.points(SFT)] == [1.0, 0.0, 0.5, 0.5]


def test_a_pair_is_its_prompt_and_both_answers_in_whichever_order() -> None:
    turns = [{"role": "user", "content": "?"}]
    key = pair_key(turns, {"a": "x", "b": "y"})
    assert key == pair_key(turns, {"b": "y", "a": "x"})
    others = [pair_key(turns, {"a": "y", "b": "x"}), pair_key(turns, {"a": "x", "b": "y "}), pair_key([], {"a": "x"})]
    assert key not in others
    assert pair_key([{"role": "user", "content": "!"}], {"a": "x", "b": "y"}) != key


def test_half_a_line_does_not_count_and_is_cut_before_the_next_vote(file: Path) -> None:
    whole = file.read_bytes()
    for length in (1, 40, len(SECOND.line.encode())):
        file.write_bytes(whole + vote(pair(3)).line.encode()[:length])
        assert read_votes(file) == [FIRST, SECOND]
        assert cut_unfinished_line(file)
        assert file.read_bytes() == whole
    assert not cut_unfinished_line(file)
    assert not cut_unfinished_line(file.with_name("none.jsonl"))


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_a_vote_that_cannot_be_written_leaves_the_file_as_it_was(
    file: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    before, write = file.read_bytes(), os.write

    def short(descriptor: int, content: bytes) -> int:
        return write(descriptor, content[:50])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(file_of_votes.os, fails, short if fails == "write" else full)
    with pytest.raises(OSError, match="space") as caught:
        append_vote(file, vote(pair(3)))
    assert caught.value.errno == errno.ENOSPC
    assert file.read_bytes() == before


def test_a_vote_that_is_taken_back_leaves_every_other_line_as_it_is(file: Path) -> None:
    other = json.dumps({**json.loads(vote(pair(3)).line), "note": "by hand"}, indent=None, separators=(",", ":"))
    with file.open("a", encoding="utf-8") as stream:
        stream.write(f"{other}\n\n{vote(pair(1), annotator='bo').line}\n")
    lines = file.read_text(encoding="utf-8").split("\n")
    remove_vote(file, FIRST)
    assert file.read_text(encoding="utf-8").split("\n") == lines[1:]
    assert [(stored_vote.annotator, stored_vote.id) for stored_vote in read_votes(file)] == [
        ("ada", "p2"),
        ("ada", "p3"),
        ("bo", "p1"),
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"answers": {SFT: "a"}}, "'answers' must have the answers of two arms; it has 1"),
        ({"answers": [1]}, "answers: [1] is not an object"),
        ({"preferred": "dpo"}, "'preferred' must be one of stage:sft, stage:dpo, tie; it is 'dpo'"),
        ({"shown_first": "tie"}, "'shown_first' must be one of stage:sft, stage:dpo"),
        ({"annotator": 3}, "annotator: 3 is not text"),
        ({"answers": {SFT: "another", DPO: "It is 1 from dpo."}}, "differs from what was voted on"),
        ({"messages": []}, "differs from what was voted on"),
        ({"version": 2}, "has format version 2, but"),
    ],
)
def test_a_line_that_was_changed_is_refused_by_number(file: Path, values: dict[str, Any], words: str) -> None:
    message = refused(file, SECOND.line, changed(FIRST.line, **values))
    assert f"{file}:2: " in message
    assert words in message


def test_a_line_that_is_no_vote_and_a_second_vote_are_refused(file: Path) -> None:
    assert ":1: not JSON" in refused(file, "not a vote", FIRST.line)
    assert "contains no JSON object" in refused(file, "3")
    again = vote(pair(1), TIE)
    assert ":2: 'ada' voted a second time on the answers of line 1" in refused(file, FIRST.line, again.line)
    file.write_text(f"{FIRST.line}\n{vote(pair(1), annotator='bo').line}\n", encoding="utf-8")
    assert [stored_vote.annotator for stored_vote in read_votes(file)] == ["ada", "bo"]


WRITER = """
import sys
from pathlib import Path
from alignment.records.votes import append_vote
from tests.judged import pair, vote
number = 0
while True:
    number += 1
    append_vote(Path(sys.argv[1]), vote(pair(number, dpo=str(number) * 2000)))
    print(number, flush=True)
"""


def test_a_killed_writer_loses_no_vote_that_it_confirmed(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(file)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "1\n"
        time.sleep(0.05)
        writer.kill()
        confirmed = int(([*writer.stdout.read().split("\n")[:-1]] or ["1"])[-1])
    cut_unfinished_line(file)
    stored: list[Vote] = read_votes(file)
    assert len(stored) in (confirmed, confirmed + 1), "the last one may be written and not yet confirmed"
    assert [stored_vote.id for stored_vote in stored] == [f"p{number}" for number in range(1, len(stored) + 1)]
