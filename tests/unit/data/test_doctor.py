"""The doctor counts rows exactly and names what may be wrong; texts that repeat, or that are held out, are noticed."""

from __future__ import annotations

import json
import random
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment.commands.doctor import show_diagnosis
from alignment.commands.shared.diagnoses import records
from alignment.config.data import DataConfig, MixedConfig, SourceConfig
from alignment.data.doctor import Diagnosis, examine
from alignment.data.near_duplicates import NearDuplicates
from alignment.data.overlap import HeldOut, LocatedText, asked, asked_in, asked_too
from alignment.data.reading import fewer_of, times_as_many
from alignment.data.records import Conversation, HeldOutPrompt, LabelledAnswer, PreferencePair, Prompt, Record
from alignment.data.turns import Message

RNG = random.Random(0)
WORDS = ["".join(RNG.choices("abcdefghijklmnopqrstuvwxyz", k=RNG.randint(2, 9))) for _ in range(400)]


def some_text(count: int) -> str:
    return " ".join(RNG.choices(WORDS, k=count))


def changed(text: str, *positions: int) -> str:
    words = text.split()
    for position in positions:
        words[position] = "altogether"
    return " ".join(words)


def _near(*texts: str) -> dict[tuple[int, int], float]:
    repeats = NearDuplicates()
    for number, text in enumerate(texts):
        repeats.add(LocatedText(where=str(number), text=text))
    return {(int(pair.where), int(pair.earlier)): pair.share for pair in repeats.pairs}


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


TEXT = "The library in Mill Lane opens at nine on weekdays and stays closed on Sundays until the end of March."


def _share(learned: str, held_out: str) -> float:
    held = HeldOut([LocatedText(where="eval:1", text=held_out), LocatedText(where="eval:2", text="Something else")])
    texts = [LocatedText(where="train:7", text=learned), LocatedText(where="train:8", text="Quite another")]
    overlaps = list(held.overlaps(texts))
    assert {(overlap.learned, overlap.held_out) for overlap in overlaps} <= {("train:7", "eval:1")}
    return overlaps[0].share if overlaps else 0.0


@pytest.mark.parametrize(
    ("learned", "held_out", "share"),
    [
        (f"Please note: {TEXT.upper()}!", TEXT, 1.0),
        ("Two plus two", "two plus two?", 1.0),
        ("你好。法国的首都是什么？请详细回答。", "法国的首都是什么？请详细回答。", 1.0),
        ("Where is İstanbul?", "where is istanbul", 1.0),
        (" ".join(TEXT.split()[:9]) + " and more follows here", TEXT, 0.0),
        ("खाली", "खुला", 0.0),  # words that differ only in their vowel signs
        ("?", "!", 0.0),
    ],
)
def test_the_same_text_is_found_whatever_its_case_script_and_punctuation(
    learned: str, held_out: str, share: float
) -> None:
    assert _share(learned, held_out) == share


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


ALL = SourceConfig()
PAIR = {"prompt": "Which is right, 4 or 5?", "chosen": "It is 4.", "rejected": "It is 5."}
SWAPPED = {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
ASKED = [{"role": "user", "content": "2 + 2?"}]


def _write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _examined(folder: Path, rows: list[Any], settings: SourceConfig = ALL) -> Diagnosis:
    return examine(_write(folder / "a.jsonl", rows), settings, records())


def _diagnosed(file: Path, form: str | None = None) -> tuple[int, str]:
    screen = StringIO()
    code = show_diagnosis(Console(file=screen, width=200), SourceConfig(source=str(file), format=form))
    return code, screen.getvalue()


def _lines_of(pairs: Any) -> list[tuple[int, int]]:
    return [(int(pair.where.rpartition(":")[2]), int(pair.earlier.rpartition(":")[2])) for pair in pairs]


def _labelled(number: int) -> dict[str, Any]:
    label = "perhaps" if number % 10 == 9 else number % 2 == 0
    return {"prompt": f"What is {number} + 1?", "completion": f"It is {number + 1}.", "label": label}


def test_rows_are_counted_exactly_by_what_stages_make_of_them(tmp_path: Path) -> None:
    rows = [_labelled(number) for number in range(200)]
    diagnosis = _examined(tmp_path, [*rows, *rows[:50], "no row"])
    assert diagnosis.rows == 251
    uses = {name: (use.records, use.repeated) for name, use in diagnosis.uses.items()}
    assert (uses["kto"], uses["sft"]) == ((225, 45), (125, 25))
    assert [diagnosis.faulty.count([stages]) for stages in ("kto", "reward, dpo")] == [26, 251]
    assert (diagnosis.num_faults, len(diagnosis.faults)) == (26, 20)
    assert [Path(fault.where).name for fault in diagnosis.faults[:3]] == ["a.jsonl:10", "a.jsonl:20", "a.jsonl:30"]
    (rows_of_reason,) = diagnosis.set_aside.values()
    assert rows_of_reason.count(["sft"]) == 100
    lines = [f"a.jsonl:{2 * number}" for number in (1, 2, 3, 4, 6, 7, 8, 9)]
    assert [Path(error.where).name for error in rows_of_reason.first(["sft"])] == lines


RANKED = {"prompt": "2 + 2?", "completions": [{"text": f"{score}.", "score": score} for score in (4, 5, 6)]}
HALF_BAD = {"messages": [*ASKED, {"role": "assistant", "content": "5."}], "label": False}


@pytest.mark.parametrize(
    ("row", "record", "limit", "times"),
    [
        (PAIR, PreferencePair, None, 4.0),
        (PAIR, PreferencePair, 30, 3.0),
        (PAIR, LabelledAnswer, None, 8.0),  # ten of its eighty answers are in five lines
        (RANKED, PreferencePair, None, 10.0),  # ten of its 120 pairs are in four lines
        (HALF_BAD, Conversation, None, 2.0),
    ],
)
def test_a_stage_is_estimated_by_its_records_and_not_by_lines(
    tmp_path: Path, row: dict[str, Any], record: type[Record], limit: int | None, times: float
) -> None:
    rows = [row | ({"label": number % 2 == 1} if row is HALF_BAD else {"id": number}) for number in range(40)]
    assert times_as_many(_write(tmp_path / "rows.jsonl", rows), DataConfig(limit=limit), record, 10) == times
    assert times_as_many(tmp_path / "rows.parquet", DataConfig(), record, 10) is None, "only lines are counted"


def test_what_is_mixed_in_shrinks_with_the_stages_own_rows(tmp_path: Path) -> None:
    file = _write(tmp_path / "other.jsonl", [PAIR] * 30)
    assert fewer_of(MixedConfig(share=0.25), file, 4.0) == MixedConfig(share=0.25)
    assert fewer_of(MixedConfig(count=9), file, 4.0) == MixedConfig(count=3)
    assert fewer_of(MixedConfig(), file, 4.0) == MixedConfig(limit=8)
    assert fewer_of(MixedConfig(limit=10), file, 4.0) == MixedConfig(limit=3)
    assert fewer_of(MixedConfig(), tmp_path / "rows.json", 4.0) == MixedConfig()


def test_the_doctor_says_what_each_stage_can_make_of_a_file(tmp_path: Path) -> None:
    pair = {"prompt": "2 + 2?", "chosen": "4.", "rejected": "5."}
    diagnosis = _examined(tmp_path, [pair, pair, {**pair, "rejected": "4."}, {**pair, "prompt": ""}])
    assert diagnosis.format.name == "preference"
    uses = {name: (use.records, use.repeated, diagnosis.faulty.count([name])) for name, use in diagnosis.uses.items()}
    assert uses == {
        "sft": (3, 2, 1),
        "reward, dpo": (2, 1, 2),
        "kto": (4, 2, 2),
        "ppo, distil": (3, 2, 1),
        "evaluate": (3, 2, 1),
    }
    assert diagnosis.meant_for == list(uses)
    assert sorted(Path(fault.where).name for fault in diagnosis.faults) == ["a.jsonl:3", "a.jsonl:4"]
    prompts = _examined(tmp_path, [{"prompt": "a"}, {"prompt": "b"}])
    assert (prompts.meant_for, prompts.faults) == (["ppo, distil", "evaluate"], [])


@pytest.mark.parametrize(
    ("row", "form", "code", "column"),
    [
        ({"prompt": "a", "choosen": "b", "rejected": "c", "Zzz": 1}, "preference", 3, "{chosen: choosen}"),
        ({"prompt": "a", "completion": "b", "sytem": "c"}, "", 0, "{system: sytem}"),
        ({"prompt": "a", "Zzz": "b"}, "", 0, ""),
    ],
)
def test_a_column_that_is_misspelt_in_every_row_counts_if_it_changes_the_format(
    tmp_path: Path, row: dict[str, Any], form: str, code: int, column: str
) -> None:
    file = _write(tmp_path / "a.jsonl", [row] * 3)
    exit_code, printed = _diagnosed(file)
    assert exit_code == code
    assert ("misspelt?" in printed) == bool(column) or not column
    assert f"data.columns={column}" in printed or not column
    assert "Zzz'" not in printed
    assert (f"every row is read as prompt, not as {form}: " in printed) == bool(form)
    if form:
        assert f"align doctor {file} 'columns={column}'\n" in printed
        assert _diagnosed(file, "prompt")[0] == 0, "its format is set"


def test_commands_that_the_doctor_names_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    file = tmp_path / "my pairs.jsonl"
    good, bad = (json.dumps({**PAIR, "chosen": "größer"}, ensure_ascii=False) for _ in range(2))
    file.write_bytes(f"{good}\n".encode() + f"{bad}\n".encode("latin-1") + f"{good}\n".encode())
    printed = _diagnosed(file)[1]
    assert f"'stages.dpo.data.source=path:{file}'" in printed
    assert "1 line is not UTF-8, but other lines are" in printed
    assert "iconv" not in printed
    file.write_bytes(f"{json.dumps(PAIR)}\n{bad}\n{bad}\n".encode("latin-1"))
    assert f"iconv -f LATIN1 -t UTF-8 '{file}' > NEW_FILE\n" in _diagnosed(file)[1]


def test_exact_duplicates_and_contradictions_are_named_by_line(tmp_path: Path) -> None:
    other = {"prompt": "Where?", "chosen": "Here.", "rejected": "There."}
    diagnosis = _examined(tmp_path, [PAIR, other, SWAPPED, PAIR, SWAPPED, other])
    assert _lines_of(diagnosis.repeats.exact) == [(4, 1), (5, 3), (6, 2)]
    assert _lines_of(diagnosis.repeats.contradictions) == [(3, 1)]
    assert diagnosis.near_duplicates.pairs == []
    printed = _diagnosed(tmp_path / "a.jsonl")[1]
    assert "  duplicates   3 rows repeat an earlier row exactly" in printed
    assert "  contradict   1 row says the opposite of an earlier row" in printed
    assert "               a.jsonl:3 prefers the answer that a.jsonl:1 rejects\n" in printed
    answer = {"prompt": "2 + 2?", "completion": "4.", "label": True}
    file = _write(tmp_path / "labels.jsonl", [answer, {**answer, "label": False}])
    assert "labels.jsonl:2 has the opposite label of labels.jsonl:1" in _diagnosed(file)[1]


def test_the_doctor_names_near_repeats_and_leaves_exact_ones_to_their_own_count(tmp_path: Path) -> None:
    texts = [some_text(30) for _ in range(10)]
    rows = [{"prompt": f"Go on from {text}", "completion": text[::-1]} for text in texts]
    near = {**rows[4], "prompt": changed(rows[4]["prompt"], 12)}
    diagnosis = _examined(tmp_path, [*rows, rows[2], near, rows[2]])
    assert _lines_of(diagnosis.near_duplicates.pairs) == [(12, 5)]
    assert _lines_of(diagnosis.repeats.exact) == [(11, 3), (13, 3)]
    assert diagnosis.uses["sft"].repeated == 2
    printed = _diagnosed(tmp_path / "a.jsonl")[1]
    assert "duplicates   2 rows repeat an earlier row exactly" in printed
    assert "duplicates   1 row is nearly the same as an earlier row" in printed
    share = diagnosis.near_duplicates.pairs[0].share
    assert f"a.jsonl:12 shares {share:.0%} of its word sequences with a.jsonl:5" in printed
    assert "only the first" not in printed
    assert "duplicates   no row" in _diagnosed(_write(tmp_path / "a.jsonl", rows))[1]


def test_votes_of_several_people_on_a_pair_are_no_duplicates_to_remove(tmp_path: Path) -> None:
    """Two people who disagree give two opposite pairs; both are to stay."""

    def voted(annotator: str, preferred: str, text: str) -> dict[str, Any]:
        answers = {"stage:sft": text, "stage:dpo": text[::-1]}
        turns = [{"role": "user", "content": f"Go on from {text}"}]
        return {"messages": turns, "answers": answers, "preferred": preferred, "annotator": annotator}

    texts = [some_text(30) for _ in range(4)]
    rows = [voted(name, arm, text) for text in texts for name, arm in (("ada", "stage:sft"), ("bo", "stage:dpo"))]
    assert "duplicates   no row" in _diagnosed(_write(tmp_path / "votes.jsonl", rows))[1]
    again = _examined(tmp_path, [*rows, voted("ada", "stage:dpo", changed(texts[0], 12))])
    assert [line for line, _ in _lines_of(again.near_duplicates.pairs)] == [9], "one person, nearly the same answers"
    twice = _examined(tmp_path, [*rows, voted("ada", "stage:sft", texts[0]), voted("ada", "stage:dpo", texts[1])])
    assert _lines_of(twice.repeats.exact) == [(9, 1)], "one person, the same vote"
    assert _lines_of(twice.repeats.contradictions) == [(10, 3)], "and the opposite"


def test_a_diagnosis_that_is_stopped_is_that_of_the_rows_so_far(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}] * 10)
    partial = examine(file, ALL, records(), go_on=lambda diagnosis: diagnosis.rows < 4)
    assert (partial.rows, partial.uses["sft"].records, partial.uses["sft"].repeated) == (4, 4, 3)
