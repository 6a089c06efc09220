"""Texts that say the same or nearly so: within a file, and between what is learned and what is held out."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from alignment.config.data import SourceConfig
from alignment.data import near_duplicates
from alignment.data.near_duplicates import NearDuplicates
from alignment.data.overlap import HeldOut, LocatedText, asked, asked_in, asked_too
from alignment.data.records import HeldOutPrompt, Prompt
from alignment.data.repeated_records import KeySet
from alignment.data.turns import Message

RNG = random.Random(0)
WORDS = ["".join(RNG.choices("abcdefghijklmnopqrstuvwxyz", k=RNG.randint(2, 9))) for _ in range(400)]


def some_text(count: int) -> str:
    """So many words, drawn at random."""
    return " ".join(RNG.choices(WORDS, k=count))


def changed(text: str, *positions: int) -> str:
    """The text with another word at each of these positions."""
    words = text.split()
    for position in positions:
        words[position] = "altogether"
    return " ".join(words)


def _near(*texts: str) -> dict[tuple[int, int], float]:
    """Numbers of a text and of the earlier one that it resembles, from 0, with what they share."""
    repeats = NearDuplicates()
    for number, text in enumerate(texts):
        repeats.add(LocatedText(where=str(number), text=text))
    return {(int(pair.where), int(pair.earlier)): pair.share for pair in repeats.pairs}


# ---- nearly the same ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 7, 15, 29])
def test_one_word_changed_in_thirty_is_found_wherever_it_stands(position: int) -> None:
    text = some_text(30)
    share = 28 / 30 if position in (0, 29) else 27 / 31
    near = _near(some_text(30), text, some_text(30), changed(text, position))
    assert near == {(3, 1): pytest.approx(share)}


def test_nearly_all_planted_near_repeats_are_found_and_nothing_else() -> None:
    texts = [some_text(40) for _ in range(400)]
    pairs = set(_near(*texts, *(changed(text, 20) for text in texts[:100])))
    assert pairs <= {(400 + number, number) for number in range(100)}
    assert len(pairs) >= 98


def test_short_texts_must_be_the_same_but_for_case_and_spaces() -> None:
    assert _near("What is 2 + 2?", "What is 2 + 3?", "Yes", "No", "Yes.", "", " ", "\n") == {}
    assert list(_near("Good  morning", "good morning", "Yes", "yes")) == [(1, 0), (3, 2)]
    assert _near("\ud800 lone", "\ud800 LONE") == {(1, 0): 1.0}


def test_a_file_of_rows_that_are_all_half_alike_does_not_take_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "COMPARISONS", 50)
    shared, repeats = some_text(60), NearDuplicates()
    repeats.add(LocatedText(where="blank", text=" \n"))
    for number in range(200):
        repeats.add(LocatedText(where=f"a.jsonl:{number}", text=f"{shared} {some_text(20)}"))
    assert repeats.passed_over > 100
    assert repeats.looked_at + repeats.passed_over == 200, "a text of blanks is not compared"


# ---- a set of keys in little memory ---------------------------------------------------------------------------------


def test_keys_are_new_once_whatever_the_batches() -> None:
    rng, seen, keys = random.Random(0), set[int](), KeySet()
    for size in [0, 1, 1, 500, *(rng.randint(0, 60) for _ in range(60))]:
        batch = [rng.choice([0, 2**64 - 1, rng.randrange(1_500), rng.getrandbits(64)]) for _ in range(size)]
        expected = []
        for key in batch:
            expected.append(key not in seen)
            seen.add(key)
        assert keys.add(np.array(batch, dtype=np.uint64)).tolist() == expected
        assert len(keys) == len(seen)
    assert len(seen) > 1_000


# ---- held-out rows among those that are learned ---------------------------------------------------------------------

TEXT = "The library in Mill Lane opens at nine on weekdays and stays closed on Sundays until the end of March."


def _share(learned: str, held_out: str) -> float:
    """How much of a held-out text is in a learned one, or zero where that is too little to be named."""
    held = HeldOut([LocatedText(where="eval:1", text=held_out), LocatedText(where="eval:2", text="Something else")])
    texts = [LocatedText(where="train:7", text=learned), LocatedText(where="train:8", text="Quite another")]
    overlaps = list(held.overlaps(texts))
    assert {(overlap.learned, overlap.held_out) for overlap in overlaps} <= {("train:7", "eval:1")}
    return overlaps[0].share if overlaps else 0.0


@pytest.mark.parametrize(
    ("learned", "held_out"),
    [
        (f"Please note: {TEXT.upper()}!", TEXT),
        ("Two plus two", "two plus two?"),
        ("你好。法国的首都是什么？请详细回答。", "法国的首都是什么？请详细回答。"),
        (
            "你好。フランスの首都はどこですか。詳しく答えてください。",
            "フランスの首都はどこですか。詳しく答えてください。",
        ),
        ("你好。เมืองหลวงของฝรั่งเศสคืออะไร", "เมืองหลวงของฝรั่งเศสคืออะไร"),
        ("दुकान कब खुलती है?", "दुकान कब खुलती है"),
        ("Where is İstanbul?", "where is istanbul"),
    ],
)
def test_the_same_text_is_found_whatever_its_case_script_and_punctuation(learned: str, held_out: str) -> None:
    assert _share(learned, held_out) == 1.0


@pytest.mark.parametrize(
    ("learned", "held_out"),
    [
        (" ".join(TEXT.split()[:9]) + " and more follows here", TEXT),
        ("Two plus three", "two plus two?"),
        ("德国有多少个联邦州？请简短回答。", "法国的首都是什么？请详细回答。"),
        ("เยอรมนีมีกี่รัฐ", "เมืองหลวงของฝรั่งเศสคืออะไร"),
        ("खाली", "खुला"),  # words that differ only in their vowel signs
        ("?", "!"),
    ],
)
def test_a_phrase_or_another_text_is_no_overlap(learned: str, held_out: str) -> None:
    assert _share(learned, held_out) == 0.0


def test_half_of_a_text_is_enough_and_the_first_of_equal_ones_is_named() -> None:
    assert 0.5 <= _share(" ".join(TEXT.split()[:16]), TEXT) < 1.0
    held_out = HeldOut(LocatedText(where=f"eval:{number}", text=TEXT) for number in range(100, 140))
    (overlap,) = held_out.overlaps([LocatedText(where="train:1", text=TEXT)])
    assert overlap.held_out == "eval:100"


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
