"""The general texts, questions and conversations that ship with the project: all different, none in two files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import permutations
from statistics import mean

import pytest

from alignment.config.data import DataConfig
from alignment.data.bundled_files import locate
from alignment.data.overlap import HeldOut, LocatedText
from alignment.data.reading import read_records
from alignment.data.records import Conversation, HeldOutPrompt, PlainText, PreferencePair, Prompt, Question, Record
from alignment.data.turns import Message
from data.quickstart.house_style import source_text, style_checks

ALL = DataConfig(source="")
TEXTS = read_records(locate("bundled:general/texts"), PlainText, ALL)
QUESTIONS = read_records(locate("bundled:general/questions"), Question, ALL)
CONVERSATIONS = read_records(locate("bundled:general/conversations"), Conversation, ALL)
FILES: dict[str, list[Record]] = {"texts": [*TEXTS], "questions": [*QUESTIONS], "conversations": [*CONVERSATIONS]}
QUICKSTART: dict[str, type[Record]] = {
    "conversations": Conversation,
    "preferences": PreferencePair,
    "heldout": HeldOutPrompt,
}


def _source(messages: Sequence[Message]) -> str:
    return source_text([message.as_dict() for message in messages])


def _located_texts(rows: list[Record]) -> Iterator[LocatedText]:
    """All that a row says, its choices too."""
    for row in rows:
        turns = [turn.content for turn in getattr(row, "messages", ())]
        parts = [*turns, *getattr(row, "choices", ()), getattr(row, "text", "")]
        yield LocatedText(where=row.where, text="\n".join(filter(None, parts)))


def test_there_are_enough_rows_and_each_has_an_id_of_its_own() -> None:
    assert (len(TEXTS), len(QUESTIONS), len(CONVERSATIONS)) == (48, 110, 124)
    ids = [row.id for rows in FILES.values() for row in rows]
    assert [name for name, count in Counter(ids).items() if count > 1 or not name] == []


@pytest.mark.parametrize(("name", "other"), list(permutations(FILES, 2)))
def test_no_file_says_what_another_says(name: str, other: str) -> None:
    assert list(HeldOut(_located_texts(FILES[other])).overlaps(_located_texts(FILES[name]))) == []


@pytest.mark.parametrize("name", QUICKSTART)
def test_nothing_of_the_quickstart_is_in_it(name: str) -> None:
    quickstart_rows = read_records(locate(f"bundled:quickstart/{name}"), QUICKSTART[name], ALL)
    held_out = HeldOut(placed for rows in FILES.values() for placed in _located_texts(rows))
    assert list(held_out.overlaps(_located_texts([*quickstart_rows]))) == []


@pytest.mark.parametrize("name", FILES)
def test_no_row_repeats_one_before_it(name: str) -> None:
    rows = list(_located_texts(FILES[name]))
    overlaps_by_row = [HeldOut(rows[:index]).overlaps([row]) for index, row in enumerate(rows) if index]
    assert [overlap for overlaps in overlaps_by_row for overlap in overlaps] == []


def test_a_question_has_four_choices_and_each_place_is_right_as_often_as_chance_has_it() -> None:
    assert {len(question.choices) for question in QUESTIONS} == {4}
    assert len({question.messages for question in QUESTIONS}) == len(QUESTIONS)
    right = Counter(question.right for question in QUESTIONS)
    assert set(right) == {0, 1, 2, 3}
    assert all(0.15 * len(QUESTIONS) < count < 0.35 * len(QUESTIONS) for count in right.values())
    assert set(Counter(question.task for question in QUESTIONS).values()) == {22}


def test_the_right_choice_is_rarely_told_by_its_length() -> None:
    """Always taking the longest, or the shortest, is right about as often as chance."""
    for chosen in (max, min):
        right = [chosen(q.choices, key=len) == q.choices[q.right] for q in QUESTIONS]
        assert mean(right) < 0.4, chosen


def test_conversations_are_of_many_kinds_and_not_in_the_house_style() -> None:
    assert len({row.task for row in CONVERSATIONS}) >= 10
    first = [
        next(index for index, turn in enumerate(row.messages) if turn.role == "assistant") for row in CONVERSATIONS
    ]
    checks = [
        style_checks(row.messages[index].content, source=_source(row.messages[:index]))
        for row, index in zip(CONVERSATIONS, first, strict=True)
    ]
    assert mean(min(factors.values()) == 1.0 for factors in checks) < 0.2  # a short answer is in it by chance
    assert len({prompt.messages for prompt in map(_prompt, CONVERSATIONS)}) == len(CONVERSATIONS)


def _prompt(row: Conversation) -> Prompt:
    return Prompt(messages=row.messages[:-1])
