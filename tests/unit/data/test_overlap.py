"""Held-out rows are found again among those that are learned, however they are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignment.config.data import SourceConfig
from alignment.data.overlap import HeldOut, LocatedText, asked, asked_in, asked_too
from alignment.data.records import HeldOutPrompt, Prompt
from alignment.data.turns import Message

TEXT = "The library in Mill Lane opens at nine on weekdays and stays closed on Sundays until the end of March."


def _overlaps(learned: str, held_out: str) -> list[tuple[str, str, float]]:
    overlaps = HeldOut([LocatedText(where="eval:1", text=held_out), LocatedText(where="eval:2", text="Something else")])
    matches = overlaps.overlaps(
        [LocatedText(where="train:7", text=learned), LocatedText(where="train:8", text="Quite another")]
    )
    return [(overlap.learned, overlap.held_out, round(overlap.share, 2)) for overlap in matches]


def test_the_same_text_is_found_whatever_its_case_and_punctuation() -> None:
    assert _overlaps(f"Please note: {TEXT.upper()}!", TEXT) == [("train:7", "eval:1", 1.0)]


def test_half_of_a_text_is_enough_and_a_phrase_is_not() -> None:
    words = TEXT.split()
    assert _overlaps(" ".join(words[:16]), TEXT)[0][2] >= 0.5
    assert _overlaps(" ".join(words[:9]) + " and more follows here", TEXT) == []


def test_a_text_of_a_few_words_counts_as_a_whole() -> None:
    assert _overlaps("Two plus two", "two plus two?") == [("train:7", "eval:1", 1.0)]
    assert _overlaps("Two plus three", "two plus two?") == []


@pytest.mark.parametrize(
    ("held_out", "other"),
    [
        ("法国的首都是什么？请详细回答。", "德国有多少个联邦州？请简短回答。"),
        ("フランスの首都はどこですか。詳しく答えてください。", "ドイツには州がいくつありますか。"),
        ("เมืองหลวงของฝรั่งเศสคืออะไร", "เยอรมนีมีกี่รัฐ"),
    ],
)
def test_scripts_without_spaces_are_compared_by_their_characters(held_out: str, other: str) -> None:
    assert _overlaps(f"你好。{held_out}", held_out) == [("train:7", "eval:1", 1.0)]
    assert _overlaps(other, held_out) == []


def test_words_that_differ_only_in_their_vowel_signs_are_different() -> None:
    assert _overlaps("खाली", "खुला") == []
    assert _overlaps("வீடு", "வாடா") == []
    assert _overlaps("दुकान कब खुलती है?", "दुकान कब खुलती है") == [("train:7", "eval:1", 1.0)]
    assert _overlaps("Where is İstanbul?", "where is istanbul") == [("train:7", "eval:1", 1.0)]


def test_of_equal_overlaps_every_call_names_the_same() -> None:
    held_out = HeldOut(LocatedText(where=f"eval:{number}", text=TEXT) for number in range(100, 140))
    (overlap,) = held_out.overlaps([LocatedText(where="train:1", text=TEXT)])
    assert overlap.held_out == "eval:100"


def test_nothing_is_like_nothing() -> None:
    assert _overlaps("", "") == []
    assert _overlaps("?", "!") == []


def _asking(*texts: str) -> list[Prompt]:
    return [Prompt(messages=(Message(role="user", content=text),)) for text in texts]


def test_a_learned_text_counts_for_every_judged_one_that_stands_in_it() -> None:
    longer = f"{TEXT} Who has the keys, and where do they hang when the library is closed for the day?"
    known = asked_too(_asking(TEXT, longer, "Something else"), _asking(longer, "Quite another"))
    assert known == {TEXT, longer}


def test_a_learned_text_that_only_a_later_turn_asks_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "held_out.jsonl"
    file.write_text(json.dumps({"turns": ["When is it open?", TEXT]}) + "\n")
    (held_out,) = asked_in(file, SourceConfig())
    assert held_out.text == f"When is it open?\n{TEXT}"
    row = HeldOutPrompt(messages=(Message(role="user", content="When is it open?"),), later_turns=(TEXT,))
    assert asked(row).text == held_out.text
    assert list(HeldOut([held_out]).overlaps([LocatedText(where="train:7", text=TEXT)]))
