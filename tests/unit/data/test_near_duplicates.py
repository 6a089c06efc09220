"""Rows that say nearly the same are found and named, and others are not."""

from __future__ import annotations

import json
import random
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment.commands.doctor.driver import show_diagnosis
from alignment.commands.shared.diagnoses import records
from alignment.config.data import SourceConfig
from alignment.data import near_duplicates
from alignment.data.doctor import examine
from alignment.data.near_duplicates import NearDuplicate, NearDuplicates
from alignment.data.overlap import LocatedText

RNG = random.Random(0)
WORDS = ["".join(RNG.choices("abcdefghijklmnopqrstuvwxyz", k=RNG.randint(2, 9))) for _ in range(400)]


def _text(count: int) -> str:
    return " ".join(RNG.choices(WORDS, k=count))


def _changed(text: str, *positions: int) -> str:
    words = text.split()
    for position in positions:
        words[position] = "altogether"
    return " ".join(words)


def _near_repeats(*texts: str) -> list[NearDuplicate]:
    repeats = NearDuplicates()
    for number, text in enumerate(texts, start=1):
        repeats.add(LocatedText(where=f"a.jsonl:{number}", text=text))
    return repeats.pairs


def _write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _diagnosis(file: Path) -> str:
    screen = StringIO()
    assert show_diagnosis(Console(file=screen, width=80), SourceConfig(source=str(file))) == 0
    return screen.getvalue()


def test_one_word_changed_in_thirty_is_found_wherever_it_stands() -> None:
    text = _text(30)
    for position in (0, 7, 15, 29):
        (pair,) = _near_repeats(_text(30), text, _text(30), _changed(text, position))
        assert (pair.where, pair.earlier) == ("a.jsonl:4", "a.jsonl:2")
        assert pair.share == pytest.approx(28 / 30 if position in (0, 29) else 27 / 31)


def test_unrelated_and_half_alike_texts_are_not_near_repeats() -> None:
    text = _text(30)
    assert _near_repeats(*(_text(30) for _ in range(300))) == []
    assert _near_repeats(text, _changed(text, *range(0, 30, 3)), " ".join(reversed(text.split()))) == []


def test_nearly_all_planted_near_repeats_are_found_and_nothing_else() -> None:
    texts = [_text(40) for _ in range(400)]
    planted = [_changed(text, 20) for text in texts[:100]]
    pairs = {(pair.earlier, pair.where) for pair in _near_repeats(*texts, *planted)}
    expected = {(f"a.jsonl:{number}", f"a.jsonl:{400 + number}") for number in range(1, 101)}
    assert pairs <= expected
    assert len(pairs) >= 98


def test_a_character_is_a_word_in_scripts_without_spaces() -> None:
    text = "这家商店星期一关门钥匙在大厅里请给我打电话谢谢你们今天天气很好吃"
    assert len(set(text)) > 25
    (pair,) = _near_repeats(text, "今天星期二商店开门到晚上八点", text.replace("厅", "堂"))
    assert (pair.where, pair.earlier) == ("a.jsonl:3", "a.jsonl:1")
    assert pair.share == pytest.approx((len(text) - 3) / (len(text) + 1))


def test_short_texts_must_be_the_same_but_for_case_and_spaces() -> None:
    assert _near_repeats("What is 2 + 2?", "What is 2 + 3?", "Yes", "No", "Yes.") == []
    assert [pair.where for pair in _near_repeats("Good  morning", "good morning", "Yes", "yes")] == [
        "a.jsonl:2",
        "a.jsonl:4",
    ]
    assert _near_repeats("", " ", "\n") == []
    assert _near_repeats("\ud800 lone", "\ud800 LONE")[0].share == 1.0


def test_of_several_that_are_alike_each_later_one_is_named_with_the_first() -> None:
    text = _text(60)
    pairs = _near_repeats(text, _changed(text, 10), _changed(text, 50), _changed(text, 30))
    assert [(pair.where, pair.earlier) for pair in pairs] == [(f"a.jsonl:{line}", "a.jsonl:1") for line in (2, 3, 4)]


def test_the_same_texts_give_the_same_answer() -> None:
    texts = [_text(30) for _ in range(100)]
    texts += [_changed(text, 3, 20) for text in texts]
    assert _near_repeats(*texts) == _near_repeats(*texts)


def test_the_doctor_names_near_repeats_and_leaves_exact_ones_to_their_own_count(tmp_path: Path) -> None:
    texts = [_text(30) for _ in range(10)]
    rows = [{"prompt": f"Go on from {text}", "completion": text[::-1]} for text in texts]
    near_one = {**rows[4], "prompt": _changed(rows[4]["prompt"], 12)}
    file = _write(tmp_path / "rows.jsonl", [*rows, rows[2], near_one, rows[2]])
    diagnosis = examine(file, SourceConfig(), records())
    assert [(pair.where, pair.earlier) for pair in diagnosis.near_duplicates.pairs] == [(f"{file}:12", f"{file}:5")]
    assert diagnosis.uses["sft"].repeated == 2
    printed = _diagnosis(file)
    assert (
        "duplicates   2 rows repeat an earlier row exactly; keep one of each, or they weigh more\n"
        "               rows.jsonl:11 repeats rows.jsonl:3\n"
        "               rows.jsonl:13 repeats rows.jsonl:3\n"
        "  duplicates   1 row is nearly the same as an earlier row; keep one of each, or it weighs more\n"
    ) in printed
    assert (
        f"rows.jsonl:12 shares {diagnosis.near_duplicates.pairs[0].share:.0%} of its word sequences with rows.jsonl:5"
        in printed
    )
    assert "only the first" not in printed
    assert "duplicates   no row" in _diagnosis(_write(tmp_path / "other.jsonl", rows))


def test_votes_of_several_people_on_a_pair_are_no_duplicates_to_remove(tmp_path: Path) -> None:
    """Two people who disagree give two opposite pairs; both are to stay."""

    def voted(annotator: str, preferred: str, text: str) -> dict[str, Any]:
        answers = {"stage:sft": text, "stage:dpo": text[::-1]}
        turns = [{"role": "user", "content": f"Go on from {text}"}]
        return {"messages": turns, "answers": answers, "preferred": preferred, "annotator": annotator}

    texts = [_text(30) for _ in range(4)]
    rows = [voted(name, arm, text) for text in texts for name, arm in (("ada", "stage:sft"), ("bo", "stage:dpo"))]
    printed = _diagnosis(_write(tmp_path / "votes.jsonl", rows))
    assert "duplicates   no row" in printed
    assert "keep one of each" not in printed
    again = voted("ada", "stage:dpo", _changed(texts[0], 12))
    printed = _diagnosis(_write(tmp_path / "again.jsonl", [*rows, again]))
    near = "duplicates   1 row is nearly the same as an earlier row"
    assert near in printed, "one person's votes on nearly the same answers"
    assert "again.jsonl:9 shares" in printed
    twice = [*rows, voted("ada", "stage:sft", texts[0]), voted("ada", "stage:dpo", texts[1])]
    repeats = examine(_write(tmp_path / "twice.jsonl", twice), SourceConfig(), records()).repeats
    assert [(row.where[-2:], row.earlier[-2:]) for row in repeats.exact] == [(":9", ":1")], "one person, the same vote"
    assert [(row.where[-3:], row.earlier[-2:]) for row in repeats.contradictions] == [(":10", ":3")], "and the opposite"


def test_a_system_turn_that_all_rows_share_makes_none_of_them_alike(tmp_path: Path) -> None:
    system = {"role": "system", "content": _text(200)}

    def row(text: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
        return {"messages": [system, *turns]}

    assert (
        examine(
            _write(tmp_path / "a.jsonl", [row(_text(12)) for _ in range(20)]), SourceConfig(), records()
        ).near_duplicates.pairs
        == []
    )


def test_pairs_are_compared_with_both_of_their_answers(tmp_path: Path) -> None:
    prompt, chosen = _text(10), _text(30)
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": _text(30)} for _ in range(5)]
    assert examine(_write(tmp_path / "a.jsonl", rows), SourceConfig(), records()).near_duplicates.pairs == []


def test_rows_behind_the_limit_are_not_compared_and_the_doctor_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [_text(30) for _ in range(6)]
    rows = [{"text": text} for text in [*texts[:3], _changed(texts[0], 9), *texts[3:], _changed(texts[1], 9)]]
    file = _write(tmp_path / "a.jsonl", rows)
    monkeypatch.setattr(near_duplicates, "TEXTS", 5)
    near = examine(file, SourceConfig(), records()).near_duplicates
    assert [(pair.where, pair.earlier) for pair in near.pairs] == [(f"{file}:4", f"{file}:1")]
    assert (near.looked_at, near.passed_over) == (5, 3)
    assert "only the first 5 distinct rows were compared" in _diagnosis(file)


def test_a_file_of_rows_that_are_all_half_alike_does_not_take_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "COMPARISONS", 50)
    shared = _text(60)
    repeats = NearDuplicates()
    for number in range(200):
        repeats.add(LocatedText(where=f"a.jsonl:{number}", text=f"{shared} {_text(20)}"))
    assert repeats.passed_over > 100
    assert repeats.looked_at + repeats.passed_over == 200
