"""The doctor counts all rows exactly and holds few of them in memory."""

from __future__ import annotations

import gc
import gzip
import json
import math
import tracemalloc
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from alignment import cli
from alignment.commands.doctor.driver import show_diagnosis
from alignment.commands.shared.diagnoses import records
from alignment.config.data import DataConfig, SourceConfig
from alignment.core.errors import DataError
from alignment.data import near_duplicates, repeated_records
from alignment.data.doctor import Diagnosis, examine
from alignment.data.objections import Objections
from alignment.data.overlap import LocatedText
from alignment.data.records import Conversation, HeldOutPrompt, PlainText, Question
from alignment.data.row_count import count_rows

ALL = SourceConfig()


def _write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _labelled(number: int) -> dict[str, Any]:
    """Of no use for pairs, set aside by SFT for half of the rows, and faulty for everyone every tenth time."""
    label = "perhaps" if number % 10 == 9 else number % 2 == 0
    return {"prompt": f"What is {number} + 1?", "completion": f"It is {number + 1}.", "label": label}


def _peak(file: Path) -> int:
    gc.collect()
    gc.freeze()  # or what other tests have left decides how long the garbage of this one stays
    tracemalloc.start()
    examine(file, ALL, records())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    gc.unfreeze()
    return peak


def test_memory_grows_by_a_few_bytes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight bytes for each of three stages, and as many again while two arrays of keys become one."""
    monkeypatch.setattr(near_duplicates, "TEXTS", 100)
    monkeypatch.setattr(repeated_records, "BATCH", 100)
    few = _write(tmp_path / "few.jsonl", [_labelled(number) for number in range(500)])
    many = _write(tmp_path / "many.jsonl", [_labelled(number) for number in range(2_500)])
    _peak(few)  # imports, and caches
    assert (_peak(many) - _peak(few)) / 2_000 < 100


def test_rows_are_counted_exactly_by_what_stages_make_of_them(tmp_path: Path) -> None:
    rows = [_labelled(number) for number in range(200)]
    diagnosis = examine(_write(tmp_path / "a.jsonl", [*rows, *rows[:50], "no row"]), ALL, records())
    assert diagnosis.rows == 251
    uses = {name: (use.records, use.repeated) for name, use in diagnosis.uses.items()}
    assert uses["kto"] == (225, 45)
    assert uses["sft"] == (125, 25)
    assert diagnosis.faulty.count(["kto"]) == 26
    assert diagnosis.faulty.count(["reward, dpo"]) == 251
    assert (diagnosis.num_faults, len(diagnosis.faults)) == (26, 20)
    assert [Path(fault.where).name for fault in diagnosis.faults[:3]] == ["a.jsonl:10", "a.jsonl:20", "a.jsonl:30"]
    (rows_of_reason,) = diagnosis.set_aside.values()
    assert list(diagnosis.set_aside) == ["'label' says that the answer is bad"]
    assert rows_of_reason.count(["sft"]) == 100
    assert [Path(error.where).name for error in rows_of_reason.first(["sft"])] == [
        f"a.jsonl:{2 * n}" for n in (1, 2, 3, 4, 6, 7, 8, 9)
    ]


@pytest.mark.parametrize(("batch", "characters"), [(1, 1 << 24), (7, 1 << 24), (1_000, 1), (1_000, 1 << 24)])
def test_what_repeats_does_not_depend_on_how_many_rows_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, characters: int
) -> None:
    monkeypatch.setattr(repeated_records, "BATCH", batch)
    monkeypatch.setattr(repeated_records, "BATCH_CHARACTERS", characters)
    monkeypatch.setattr(near_duplicates, "TEXTS", 12)
    long = " ".join(f"word{number}" for number in range(40))
    pairs = [{"prompt": f"{long} {n % 8}", "chosen": f"{long} yes {n % 6}", "rejected": "No."} for n in range(40)]
    diagnosis = examine(_write(tmp_path / "a.jsonl", pairs), ALL, records())
    distinct = {(n % 8, n % 6) for n in range(40)}
    assert diagnosis.uses["reward, dpo"].repeated == 40 - len(distinct) == 16
    assert diagnosis.uses["ppo, distil"].repeated == 32
    near = diagnosis.near_duplicates
    assert (near.looked_at, near.passed_over) == (12, len(distinct) - 12)
    assert [Path(pair.where).name for pair in near.pairs] == [f"a.jsonl:{line}" for line in range(2, 13)]


def test_a_row_that_several_stages_object_to_counts_once_and_the_first_that_is_asked_says_why() -> None:
    objections = Objections(2)

    def error(text: str) -> DataError:
        return DataError(text)

    objections.add(3, {"dpo": error("3 dpo")})
    objections.add(5, {"dpo": error("5 dpo"), "sft": error("5 sft")})
    objections.add(6, {"sft": error("6 sft")})
    objections.add(7, {"dpo": error("7 dpo")})
    objections.add(9, {"dpo": error("9 dpo")})
    assert [objections.count(stages) for stages in (["dpo"], ["sft"], ["dpo", "sft"], ["ppo"])] == [4, 2, 5, 0]
    assert [str(objection) for objection in objections.first(["sft", "dpo"])] == ["3 dpo", "5 sft"]
    assert [str(objection) for objection in objections.first(["dpo"])] == ["3 dpo", "5 dpo"]
    assert [str(objection) for objection in objections.first(["sft"])] == ["5 sft", "6 sft"]
    assert objections.stages() == {"dpo", "sft"}


def test_a_diagnosis_that_is_stopped_is_that_of_the_rows_so_far(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}] * 10)

    def go_on(diagnosis: Diagnosis) -> bool:
        return diagnosis.rows < 4

    partial = examine(file, ALL, records(), go_on=go_on)
    assert (partial.rows, partial.uses["sft"].records, partial.uses["sft"].repeated) == (4, 4, 3)


def test_rows_are_counted_before_they_are_read_where_that_is_quick(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.mkdir()
    (lines / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (lines / "b.ndjson").write_text('{"text": "c"}\n{"text": "d"}')
    pq.write_table(pa.table({"text": ["e", "f", "g"]}), lines / "c.parquet")
    assert count_rows(lines, ALL) == 7
    assert count_rows(lines, DataConfig(source="", limit=3)) is None
    (lines / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "h"}\n'))
    assert count_rows(lines, ALL) is None
    (lines / "e.parquet").write_text("no such file")
    assert count_rows(lines / "e.parquet", ALL) is None
    assert count_rows(tmp_path / "none.jsonl", ALL) is None


def test_a_text_of_blanks_is_not_compared() -> None:
    near = near_duplicates.NearDuplicates()
    near.add(LocatedText(where="a:1", text=" \n"))
    assert near.looked_at == 0


PAIR = {"prompt": "Which is right, 4 or 5?", "chosen": "It is 4.", "rejected": "It is 5."}
SWAPPED = {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}


def _printed(file: Path) -> str:
    return _diagnosed(file)[1]


def _diagnosed(file: Path, form: str | None = None) -> tuple[int, str]:
    """The exit code, and what is printed."""
    screen = StringIO()
    code = show_diagnosis(Console(file=screen, width=200), SourceConfig(source=str(file), format=form))
    return code, screen.getvalue()


@pytest.mark.parametrize(
    ("more", "labels"),
    [
        ({"good": True}, ["good"]),
        ({"good": "False"}, ["good"]),
        ({"good": "yes"}, []),
        ({"good": True, "label": "x"}, []),
        ({"good": None}, []),
    ],
)
def test_a_column_of_true_and_false_beside_an_answer_may_be_its_label(
    tmp_path: Path, more: dict[str, Any], labels: list[str]
) -> None:
    rows = [{"prompt": f"{number}?", "completion": "Yes.", "good": "true"} | more for number in range(3)]
    file = _write(tmp_path / "a.jsonl", rows)
    assert examine(file, ALL, records()).likely_labels == labels
    assert ("columns={label: good}" in _printed(file)) == bool(labels)


def test_numbers_that_are_not_finite_are_counted_by_column(tmp_path: Path) -> None:
    rows = [PAIR | {"chosen_score": score, "rejected_score": 1.0} for score in (2.0, math.nan, math.inf)]
    file = _write(tmp_path / "a.jsonl", rows)
    assert examine(file, ALL, records()).not_finite == {"chosen_score": 2}
    assert "2 rows have NaN or infinity in the column 'chosen_score'" in _printed(file)


@pytest.mark.parametrize("batch", [1, 4_096])
def test_exact_duplicates_and_contradictions_are_named_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(repeated_records, "BATCH", batch)
    other = {"prompt": "Where?", "chosen": "Here.", "rejected": "There."}
    file = _write(tmp_path / "a.jsonl", [PAIR, other, SWAPPED, PAIR, SWAPPED, other])
    diagnosis = examine(file, ALL, records())
    short = [(Path(repeat.where).name, Path(repeat.earlier).name) for repeat in diagnosis.repeats.exact]
    assert short == [("a.jsonl:4", "a.jsonl:1"), ("a.jsonl:5", "a.jsonl:3"), ("a.jsonl:6", "a.jsonl:2")]
    (contradiction,) = diagnosis.repeats.contradictions
    assert (contradiction.where, contradiction.earlier) == (f"{file}:3", f"{file}:1")
    assert diagnosis.near_duplicates.pairs == []
    printed = _printed(file)
    assert "  duplicates   3 rows repeat an earlier row exactly; keep one of each, or they weigh more\n" in printed
    assert (
        "  contradict   1 row says the opposite of an earlier row; correct it or remove one of the two\n"
        "               a.jsonl:3 prefers the answer that a.jsonl:1 rejects\n"
    ) in printed


ASKED = {"messages": [{"role": "user", "content": "2 + 2?"}]}
WEIGHTED = [
    {"role": "assistant", "content": "4.", "weight": 0},
    *ASKED["messages"],
    {"role": "assistant", "content": "4"},
]
DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tools": (ASKED | {"tools": [{"name": "add"}]}, ASKED | {"tools": [{"name": "add", "default": math.nan}]}),
    "choices": (
        {"question": "2 + 2?", "choices": ["4", "5"], "answer": "4"},
        {"question": "2 + 2?", "choices": ["4", "5", "6"], "answer": "4"},
    ),
    "what is learned": (
        {"messages": [*ASKED["messages"], *WEIGHTED]},
        {"messages": [*ASKED["messages"], WEIGHTED[0] | {"weight": 1}, *WEIGHTED[1:]]},
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_rows_that_differ_in_one_respect_are_no_repeats(tmp_path: Path, name: str) -> None:
    first, second = DIFFERENT[name]
    diagnosis = examine(_write(tmp_path / "a.jsonl", [first, second, first]), ALL, records())
    assert [(Path(row.where).name, Path(row.earlier).name) for row in diagnosis.repeats.exact] == [
        ("a.jsonl:3", "a.jsonl:1")
    ]
    uses = {use.record: use for use in diagnosis.uses.values()}
    record = {"tools": HeldOutPrompt, "choices": Question, "what is learned": Conversation}[name]
    assert (uses[record].records, uses[record].repeated) == (3, 1)


def test_a_row_of_several_pairs_repeats_an_earlier_one_only_with_all_of_them(tmp_path: Path) -> None:
    answers = [{"text": text, "score": score} for text, score in (("a", 3), ("b", 2), ("c", 1))]
    short, long = ({"prompt": "?", "completions": answers[:number]} for number in (2, 3))
    diagnosis = examine(_write(tmp_path / "a.jsonl", [short, long, long, short]), ALL, records())
    assert [(Path(row.where).name, Path(row.earlier).name) for row in diagnosis.repeats.exact] == [
        ("a.jsonl:3", "a.jsonl:2"),
        ("a.jsonl:4", "a.jsonl:1"),
    ]


def test_an_answer_with_both_labels_is_a_contradiction(tmp_path: Path) -> None:
    row = {"prompt": "2 + 2?", "completion": "4.", "label": True}
    file = _write(tmp_path / "a.jsonl", [row, {**row, "label": False}])
    assert "a.jsonl:2 has the opposite label of a.jsonl:1" in _printed(file)


def test_faulty_rows_are_listed_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [json.dumps(PAIR), '{"prompt": "a", "chosen": "b", "rejected": 3}', "{", json.dumps({**PAIR, "chosen": 1})]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join([*rows, "{"]))
    diagnosis = examine(file, ALL, records())
    assert [Path(fault.where).name for fault in diagnosis.faults] == [f"a.jsonl:{line}" for line in (2, 3, 4, 5)]
    file.write_text("\n".join(rows[:2]))
    assert "  faulty       1 row\n" in _printed(file)


def test_a_misspelt_column_is_named_even_if_every_row_can_be_read(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.jsonl", [{"prompt": "a", "choosen": "b", "rejected": "c", "Zzz": 1}] * 2)
    printed = _printed(file)
    assert (
        "  misspelt?    nothing reads the column 'choosen'; did you mean 'chosen'? If so, rename it, or set "
        "data.columns={chosen: choosen}\n"
    ) in printed
    assert f"               to try these columns: align doctor {file} 'columns={{chosen: choosen}}'\n" in printed
    assert "Zzz'" not in printed
    assert "misspelt?" not in _printed(_write(tmp_path / "b.jsonl", [PAIR]))


@pytest.mark.parametrize(
    ("row", "form", "code"),
    [
        ({"prompt": "a", "choosen": "b", "rejected": "c"}, "preference", 3),
        ({"prompt": "a", "completon": "b"}, "prompt_completion", 3),
        ({"question": "a", "anwser": "b"}, "question_answer", 3),
        ({"prompt": "a", "completion": "b", "sytem": "c"}, "", 0),
        ({"prompt": "a", "completon": 3}, "", 0),
        ({"prompt": "a", "Zzz": "b"}, "", 0),
    ],
)
def test_a_column_that_is_misspelt_in_every_row_counts_if_it_changes_the_format(
    tmp_path: Path, row: dict[str, Any], form: str, code: int
) -> None:
    file = _write(tmp_path / "a.jsonl", [row] * 3)
    exit_code, printed = _diagnosed(file)
    assert exit_code == code
    assert ("               until then, every row is read as prompt, not as " in printed) == bool(code)
    assert f", not as {form}: " in printed or not form


def test_a_misspelt_column_does_not_count_if_the_format_is_set(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.jsonl", [{"prompt": "a", "choosen": "b", "rejected": "c"}] * 2)
    assert _diagnosed(file, "prompt")[0] == 0


def test_texts_beside_prompts_are_texts_too(tmp_path: Path) -> None:
    rows = [{"prompt": f"Write about {number}.", "text": f"{number} is a number."} for number in range(3)]
    diagnosis = examine(_write(tmp_path / "a.jsonl", rows), ALL, records())
    assert diagnosis.format.name == "prompt"
    assert [use.records for use in diagnosis.uses.values() if use.record is PlainText] == [3]
    prompts = _write(tmp_path / "b.jsonl", [{"prompt": "Write about 3."}])
    assert not [use for use in examine(prompts, ALL, records()).uses.values() if use.record is PlainText]


def test_texts_are_compared_with_prompts_that_must_not_be_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = "Who has the keys of the library when it is closed on a Monday in winter?"
    texts = _write(tmp_path / "texts.jsonl", [{"text": "The shop is open."}, {"text": f"A quiz. {asked} Nobody."}])
    held_out = _write(tmp_path / "heldout.jsonl", [{"prompt": asked}])
    assert cli.main(["doctor", str(texts), "--against", str(held_out)]) == 0
    printed = capsys.readouterr().out
    assert f"overlap      1 row resembles a prompt of {held_out}\n" in printed
    assert "texts.jsonl:2 has 100% of heldout.jsonl:1\n" in printed


def test_a_file_of_which_every_row_is_set_aside_is_of_no_use(tmp_path: Path) -> None:
    tie = {"messages": [{"role": "user", "content": "a"}], "answers": {"x": "b", "y": "c"}, "preferred": "tie"}
    transcript = "\n\nHuman: {}\n\nAssistant: yes."
    apart = {"chosen": transcript.format("a"), "rejected": transcript.format("b")}
    for number, row in enumerate((tie, apart)):
        code, printed = _diagnosed(_write(tmp_path / f"{number}.jsonl", [row]))
        assert "  set aside    1 row, in " in printed
        assert "  to use it    no stage can use it\n" in printed
        assert code == 3


def test_the_doctor_says_whether_other_lines_are_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    good, bad = (json.dumps({**PAIR, "chosen": "größer"}, ensure_ascii=False) for _ in range(2))
    file.write_bytes(f"{good}\n".encode() + f"{bad}\n".encode("latin-1") + f"{good}\n".encode())
    assert "1 line is not UTF-8, but other lines are: correct only this line" in _printed(file)
    file.write_bytes(f"{json.dumps(PAIR)}\n{bad}\n{bad}\n".encode("latin-1"))
    assert (
        "2 lines are not UTF-8, and the others have only ASCII characters; if the file is Latin-1, convert it: "
        f"iconv -f LATIN1 -t UTF-8 {file} > NEW_FILE\n"
    ) in _printed(file)
    spaced = file.rename(tmp_path / "a b.jsonl")
    assert f"iconv -f LATIN1 -t UTF-8 '{spaced}' > NEW_FILE\n" in _printed(spaced)


def test_the_doctor_s_settings_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    file = _write(tmp_path / "my pairs.jsonl", [PAIR])
    assert f"to use it    'stages.dpo.data.source=path:{file}'\n" in _printed(file)
