"""Who sees which pair when, and what a vote is turned into."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.commands.judge.ballots import AlreadyJudged, Ballots, Choice, Refused, UnknownPair, annotator_name
from alignment.evaluation.answer_pairs import shown_first
from alignment.records.votes import TIE, append_vote, read_votes
from tests.judged import ARMS, DPO, pair, vote

PAIRS = [pair(number) for number in range(1, 7)]


@pytest.fixture
def ballots(tmp_path: Path) -> Ballots:
    return Ballots(tmp_path / "votes.jsonl", PAIRS, ARMS)


def judge(ballots: Ballots, annotator: str, choice: Choice = Choice.first) -> str:
    """Votes on the next pair; returns its key."""
    ballot = ballots.standing(annotator).ballot
    assert ballot is not None
    ballots.vote(annotator, ballot.pair.key, choice)
    return ballot.pair.key


def test_every_annotator_sees_every_pair_once_and_all_in_one_order(ballots: Ballots, tmp_path: Path) -> None:
    ada = [judge(ballots, "ada") for _ in PAIRS]
    assert sorted(ada) == sorted(about.key for about in PAIRS)
    assert ballots.standing("ada").ballot is None
    bo = [judge(ballots, "bo") for _ in range(2)]
    again = Ballots(tmp_path / "votes.jsonl", PAIRS, ARMS)
    assert (again.standing("bo").judged, again.standing("ada").judged, again.standing("cy").judged) == (2, 6, 0)
    bo += [judge(again, "bo") for _ in range(4)]
    assert bo == ada
    assert again.judged() == {"ada": 6, "bo": 6}


def test_a_key_stands_for_the_answer_that_was_shown_there(ballots: Ballots, tmp_path: Path) -> None:
    expected = {}
    for choice in (*Choice, *Choice):
        ballot = ballots.standing("ada").ballot
        assert ballot is not None
        first = shown_first(ballot.pair, "ada")
        second = next(arm for arm in ARMS if arm != first)
        assert ballot.answers == (ballot.pair.answers[first], ballot.pair.answers[second])
        ballots.vote("ada", ballot.pair.key, choice)
        expected[ballot.pair.key] = {Choice.first: first, Choice.second: second, Choice.tie: TIE}[choice]
    stored = read_votes(tmp_path / "votes.jsonl")
    assert {entry.pair: entry.preferred for entry in stored} == expected
    assert all(
        entry.shown_first == shown_first(about, "ada") for entry in stored for about in PAIRS if about.key == entry.pair
    )
    assert len({entry.shown_first for entry in stored}) == 2, "no arm is always first"


def test_a_second_vote_and_an_unknown_pair_are_refused_and_nothing_is_written(ballots: Ballots, tmp_path: Path) -> None:
    key = judge(ballots, "ada")
    before = (tmp_path / "votes.jsonl").read_bytes()
    with pytest.raises(AlreadyJudged, match="ada has judged this pair already"):
        ballots.vote("ada", key, Choice.second)
    with pytest.raises(UnknownPair, match="no such pair"):
        ballots.vote("ada", "0" * 32, Choice.first)
    assert (tmp_path / "votes.jsonl").read_bytes() == before
    ballots.vote("bo", key, Choice.second)


def test_undo_takes_ones_own_last_vote_back_and_shows_that_pair_again(ballots: Ballots, tmp_path: Path) -> None:
    judge(ballots, "ada")
    last = judge(ballots, "ada")
    judge(ballots, "bo")
    ballots.undo("ada")
    standing = ballots.standing("ada")
    assert standing.ballot is not None
    assert (standing.judged, standing.ballot.pair.key) == (1, last)
    assert [entry.annotator for entry in read_votes(tmp_path / "votes.jsonl")] == ["ada", "bo"]
    ballots.vote("ada", last, Choice.tie)
    ballots.undo("bo")
    with pytest.raises(Refused, match="bo has no vote to undo"):
        ballots.undo("bo")


def test_equal_answers_and_votes_on_other_answers_are_counted_apart(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    append_vote(file, vote(pair(1, dpo="An earlier answer.")))
    append_vote(file, vote(PAIRS[1]))
    ballots = Ballots(file, [*PAIRS, pair(9, sft="same", dpo=" same")], ARMS)
    assert (ballots.total, ballots.num_same, ballots.num_stale) == (6, 1, 1)
    assert ballots.judged() == {"ada": 1}
    ballots.undo("ada")
    with pytest.raises(Refused):
        ballots.undo("ada")
    assert [entry.answers[DPO] for entry in read_votes(file)] == ["An earlier answer."], (
        "old votes are nobody's to undo"
    )


@pytest.mark.parametrize(("text", "name"), [("  Ada   Lovelace ", "Ada Lovelace"), ("Zoe\u0308", "Zoë"), ("李", "李")])
def test_a_name_is_text_without_superfluous_spaces(text: str, name: str) -> None:
    assert annotator_name(text) == name


@pytest.mark.parametrize("text", ["", "   ", "a" * 41, "a\x1bb", "a\u202eb", "a\u200bb", "\ud800"])
def test_a_name_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="1 to 40 printable characters"):
        annotator_name(text)
