"""Rows as records: lists written as text, every fault named in one pass, and what a record holds of its row."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from alignment.commands.shared.diagnoses import records
from alignment.config.data import DataConfig, OnError
from alignment.core.errors import DataError
from alignment.data.doctor import examine
from alignment.data.fields import Fields, SetAside
from alignment.data.formats import FORMATS
from alignment.data.reading import iterate, read_records, right_form, start
from alignment.data.records import Conversation, HeldOutPrompt, LabelledAnswer, PreferencePair, Prompt, Question
from alignment.data.row_files import RawRow, rows_of
from alignment.data.turns import Message

ALL = DataConfig(source="")
SKIP = DataConfig(source="", on_error=OnError.skip)


def _lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _written(file: Path, rows: list[Any]) -> Path:
    if file.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows([_as_texts(row) for row in rows])
    else:
        file.write_text(_lines(rows))
    return file


def _as_texts(row: dict[str, Any]) -> dict[str, Any]:
    return {column: json.dumps(value) if isinstance(value, list) else value for column, value in row.items()}


def _refused(file: Path, data: DataConfig, record: Any = Conversation, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read_records(file, record, data, **options)
    assert caught.value.exit_code == 3
    return caught.value


QUESTION, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "{{four}}"}
LISTS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [QUESTION, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "{{four}}"}]},
    "chosen_messages": {
        "chosen_messages": [QUESTION, ANSWER],
        "rejected_messages": [QUESTION, ANSWER | {"content": "5"}],
    },
    "ranked": {"prompt": "2 + 2?", "completions": [{"text": "{{four}}", "score": 2}, {"text": "5", "score": 1}]},
    "choices": {"question": "2 + 2?", "choices": ["5", "{{four}}"], "answer": "{{four}}"},
    "turns": {"turns": ["2 + 2?", "Times 3?"]},
    "alpaca": {"history": [["Hi", "Hello"]], "instruction": "2 + 2?", "output": "{{four}}"},
}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("name", LISTS)
def test_a_list_may_be_the_text_of_its_json(tmp_path: Path, name: str, suffix: str) -> None:
    """As every list of a CSV is; a prompt of JSON would otherwise be asked as it stands."""
    row, record = LISTS[name], Prompt if name == "turns" else Conversation
    files = [_written(tmp_path / "a.jsonl", [row]), _written(tmp_path / f"texts{suffix}", [_as_texts(row)])]
    assert [start(file, ALL).format.name for file in files] == [name, name]
    settings = replace(ALL, placeholders={"four": 'a "4"'})
    as_lists, as_texts = (read_records(file, record, settings) for file in files)
    assert as_texts == as_lists
    assert len(as_lists) == 1


CALLS = {
    "messages": [
        QUESTION,
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"numbers": [2, 2]}}}]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "show", "arguments": {"text": "4"}}}]},
    ],
    "tools": [
        {"type": "function", "function": {"name": "add", "parameters": {"properties": {"numbers": {"type": "array"}}}}},
        {"type": "function", "function": {"name": "show", "parameters": {"properties": {"text": {"minLength": 1}}}}},
        {"type": "function", "function": {"name": "clear", "description": "Clears the screen."}},
    ],
    "checked": [{"name": "a", "limit": None}, {"name": None, "limit": 3}],
}


def test_tools_and_calls_have_the_fields_that_they_were_written_with(tmp_path: Path) -> None:
    """Parquet gives each tool the parameters of all others, as null, and each call their arguments."""
    (written,) = read_records(_written(tmp_path / "calls.jsonl", [CALLS]), Conversation, ALL)
    (stored,) = read_records(_written(tmp_path / "calls.parquet", [CALLS]), Conversation, ALL)
    assert stored == written
    assert list(stored.tools) == CALLS["tools"]
    arguments = [call["function"]["arguments"] for turn in stored.messages for call in turn.tool_calls]
    assert arguments == [{"numbers": [2, 2]}, {"text": "4"}]
    (row,) = rows_of(tmp_path / "calls.parquet")
    assert isinstance(row, RawRow)
    assert row.value["checked"] == CALLS["checked"], "a column that a scorer may read stays as it is"
    schemas = [{"name": name, "input_schema": {"properties": {name: {"type": "string"}}}} for name in ("here", "now")]
    file = _written(tmp_path / "anthropic.parquet", [{"messages": [QUESTION], "tools": schemas}])
    (prompt,) = read_records(file, Prompt, ALL)
    assert [tool["function"] for tool in prompt.tools] == schemas


ASKED = {"role": "user", "content": "a"}
GOOD = {"messages": [ASKED, {"role": "assistant", "content": "b"}]}
BAD = {"messages": 3}
PLANTED: list[tuple[Any, str]] = [
    (b'{"messages": [', "not JSON"),
    (b'{"messages": "\xff"}', "not UTF-8"),
    (b"[1, 2]", "a row must be a JSON object; this one is [1, 2]"),
    (b"NaN", "a row must be a JSON object"),
    ({}, "'messages' is missing"),
    ({"message": []}, "'messages' is missing; the row has 'message'"),
    ({"messages": None}, "'messages' is null"),
    ({"messages": []}, "'messages' must be a list of turns and not empty"),
    (BAD, "'messages' must be text"),
    ({"messages": {"role": "user"}}, "'messages' must be text"),
    ({"messages": ["a"]}, "'messages[0]' must be an object"),
    ({"messages": [{}]}, "'messages[0].role' must be one of"),
    ({"messages": [{**ASKED, "role": "boss"}]}, "'messages[0].role' must be one of"),
    ({"messages": [{"role": "user"}]}, "'messages[0].content' must be text and not empty; it is None"),
    ({"messages": [{**ASKED, "content": " \n"}]}, "'messages[0].content' must be text and not empty"),
    ({"messages": [{**ASKED, "content": [3]}]}, "'messages[0].content' must have parts"),
    ({"messages": [ASKED]}, "'messages' must end with an assistant turn; the last one's role is 'user'"),
    ({"messages": [ASKED, {**ASKED, "role": "system"}]}, "'messages[1].role' is 'system'"),
    ({"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [{}]}]}, "must have a function"),
    ({"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": "x"}]}, "tool_calls' must be a list"),
    ({**GOOD, "tools": "{"}, "'tools' must be JSON"),
    ({**GOOD, "tools": {"name": "x"}}, "'tools' must be a list"),
    ({"messages": [{**ASKED, "content": "x" * 2_000_000}]}, "'messages' must end with an assistant turn"),
]


def _planted(folder: Path) -> Path:
    lines = [json.dumps(GOOD).encode()] * 3
    for content, _ in PLANTED:
        lines += [content if isinstance(content, bytes) else json.dumps(content).encode(), json.dumps(GOOD).encode()]
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    return folder / "rows.jsonl"


def test_all_planted_faults_are_found_in_one_pass(tmp_path: Path) -> None:
    file, faults = _planted(tmp_path), list[DataError]()
    reading = start(file, ALL)
    reading.on_left_out = faults.append
    with pytest.raises(DataError) as caught:
        list(iterate(file, Conversation, ALL, reading=reading))
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith("23 faulty rows:\n")
    assert "and 3 more" in str(caught.value)
    for number, (fault, (_, message)) in enumerate(zip(faults, PLANTED, strict=True)):
        assert fault.where == f"{file}:{4 + 2 * number}"
        assert message in fault.message
        assert len(fault.message) < 300, "a value is shortened"
        assert fault.remedy


def test_faulty_rows_may_be_skipped_up_to_a_share_and_are_listed(tmp_path: Path) -> None:
    file = _planted(tmp_path)
    skip = replace(SKIP, max_skipped=0.5)
    reading = start(file, skip)
    assert len(list(iterate(file, Conversation, skip, reading=reading))) == 26
    assert [fault.where for fault in reading.faults.first] == [f"{file}:{4 + 2 * number}" for number in range(20)]
    assert reading.faults.count == 23
    assert "more than 5% of 49 rows are faulty" in str(_refused(file, SKIP))


def test_a_fault_of_many_rows_is_told_once_with_advice_for_each_kind(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n" + '{"messages": 3}\n' * 3 + '{"messages": []}\n' + '{"a": \n')
    lines = str(_refused(file, ALL)).splitlines()
    assert lines[0] == "5 faulty rows:"
    assert lines[1].startswith(f"  {file}:2 and 2 other rows: 'messages' ")
    assert [line.split(":")[1] for line in lines[2:] if str(file) in line and "`" not in line] == ["5", "6"]
    advice = [line.strip() for line in lines if "→" in line]
    assert advice[0].startswith('→ a row of the right form: {"messages"')
    assert "JSON Lines" in advice[1]
    assert advice[2].startswith(f"→ `align doctor {file}` ")
    assert "data.on_error=skip data.max_skipped=0.84 " in advice[2]
    assert "on_error" not in str(_refused(_written(file, [BAD] * 3), ALL)), "nobody is told to leave out all rows"


@pytest.mark.parametrize(
    ("name", "content", "where", "message"),
    [
        ("a.csv", "prompt,chosen,rejected\nHi.,,No.\nHi.,Yes.,No.\n", ":2", "'chosen'"),
        ("a.csv", 'messages\n"[{""role"": ""user"", ""content"": ""\\ud83d""}]"\n', ":2", "'messages' must be a list"),
        ("a.jsonl", '\n {"messages": []}\n', ":2", "'messages' must be a list"),
        ("a.jsonl", "\n \n", "", "contains no rows"),
        (
            "a.jsonl",
            '{"prompt": "a", "completion": "b", "label": false}\n' * 2,
            "",
            "all 2 rows were set aside ('label'",
        ),
        ("a.jsonl", '{"q": "2 + 2?"}\n', "", "no known format has the columns 'q'"),
    ],
)
def test_a_file_without_a_record_is_named(tmp_path: Path, name: str, content: str, where: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    error = _refused(tmp_path / name, ALL, PreferencePair if "chosen" in content else Conversation)
    assert str(error).startswith(f"{tmp_path / name}{where}: ")
    assert message in error.message


def test_columns_of_other_names_are_read_and_one_that_no_row_has_is_named(tmp_path: Path) -> None:
    file = _written(tmp_path / "a.jsonl", [{"q": "2 + 2?", "good": "4.", "bad": "5.", "prompt": "unrelated"}])
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    (pair,) = read_records(file, PreferencePair, replace(ALL, columns=columns))
    assert (pair.messages[0].content, pair.chosen, pair.rejected) == ("2 + 2?", "4.", "5.")
    error = _refused(file, replace(ALL, columns=columns | {"chosen": "nosuch"}), PreferencePair)
    assert "'nosuch'" in error.message
    assert error.remedy == "the columns are bad, good, prompt, q"


def test_placeholders_are_filled_everywhere_and_others_left(tmp_path: Path) -> None:
    row = {"messages": [{**ASKED, "content": "{{name}}?"}, *GOOD["messages"][1:]], "n": "{{other}}"}
    file = _written(tmp_path / "a.jsonl", [row])
    assert dict(examine(file, ALL, records()).placeholders) == {"name": 1, "other": 1}
    data = replace(ALL, placeholders={"name": "Ada"})
    (conversation,) = read_records(file, Conversation, data)
    assert conversation.messages[0].content == "Ada?"
    assert dict(examine(file, data, records()).placeholders) == {"other": 1}


USER = {"role": "user", "content": "2 + 2?"}
RECORDS_ANSWER = {"role": "assistant", "content": "4."}
RECORDS_ASKED = (Message(role="user", content="2 + 2?"),)
RANKED = [{"text": "5.", "rank": 2}, {"text": "4.", "rank": 1}]
PAIR = {"messages": [USER], "chosen": "4.", "rejected": "5."}
THOUGHT_AND_ANSWER = "<think>\n2 and 2.\n</think>\n\n4."


def _made(record: Any, row: Any, form: str = "messages") -> Any:
    (made,) = record.of(FORMATS[form].read(Fields(row, where="x:1", example="")))
    return made


@pytest.mark.parametrize(
    ("last", "more", "reference"),
    [
        ([RECORDS_ANSWER], {}, "4."),
        ([RECORDS_ANSWER | {"reasoning_content": "2 and 2."}], {}, THOUGHT_AND_ANSWER),
        ([{**RECORDS_ANSWER, "content": "", "thinking": "Add.", "tool_calls": [{"name": "add"}]}], {}, ""),
        ([RECORDS_ANSWER], {"reference": "Four."}, "Four."),
        ([], {"reference": 4.0}, "4"),
        ([], {"reference": None}, ""),
        ([], {"reference": math.nan}, ""),  # as pandas writes an absent text
        ([], {"reference": ["4.", "Four."]}, ""),  # for metrics that take the best of several
        ([], {}, ""),
        ([RECORDS_ANSWER], {"label": True}, "4."),
        ([RECORDS_ANSWER], {"label": False}, ""),  # a bad answer is no reference
    ],
)
def test_a_held_out_prompt_may_have_a_reference_in_a_column_or_as_its_last_turn(
    last: list[Any], more: dict[str, Any], reference: str
) -> None:
    prompt = _made(HeldOutPrompt, {"messages": [USER, *last], **more}, "kto" if "label" in more else "messages")
    assert (prompt.messages, prompt.reference) == (RECORDS_ASKED, reference)


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        ("kto", {"prompt": "2 + 2?", "completion": "4.", "label": True}, [("4.", True)]),
        ("kto", {"messages": [USER, RECORDS_ANSWER], "label": "false"}, [("4.", False)]),
        (
            "kto",
            {"prompt": [USER], "completion": [RECORDS_ANSWER], "label": True},
            [("4.", True)],
        ),  # TRL's conversations
        ("kto", {"prompt": "2 + 2?", "completion": RECORDS_ANSWER, "label": False}, [("4.", False)]),
        ("kto", {"messages": [USER], "completion": "4.", "label": 1}, [("4.", True)]),
        ("preference", PAIR, [("4.", True), ("5.", False)]),
        ("ranked", {"prompt": "2 + 2?", "completions": RANKED}, [("4.", True), ("5.", False)]),
    ],
)
def test_a_labelled_answer_is_read_from_a_label_or_from_a_pair(
    form: str, row: dict[str, Any], expected: list[tuple[str, bool]]
) -> None:
    records = list(LabelledAnswer.of(FORMATS[form].read(Fields(row, where="x:1", example=""))))
    assert [(record.answer, record.desirable) for record in records] == expected
    assert {(record.messages, record.where) for record in records} == {(RECORDS_ASKED, "x:1")}


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected", "margin"),
    [(9, 2.5, (9.0, 2.5), 6.5), (-1, -1, (-1.0, -1.0), 0.0), ("9", " 2.5 ", (9.0, 2.5), 6.5)],  # text is as in CSV
)
def test_a_pair_holds_the_scores_of_its_row(chosen: Any, rejected: Any, expected: Any, margin: float) -> None:
    pair = _made(PreferencePair, PAIR | {"chosen_score": chosen, "rejected_score": rejected}, "preference")
    assert (pair.scores, pair.margin()) == (expected, margin)


@pytest.mark.parametrize(
    "scores",
    [
        {},
        {"chosen_score": 9},
        {"chosen_score": "nan", "rejected_score": "1"},
        {"chosen_score": True, "rejected_score": 0},
        {"chosen_score": 1e308, "rejected_score": -1e308},
    ],
)
def test_a_pair_without_two_finite_numbers_has_no_scores_and_no_margin(scores: dict[str, Any]) -> None:
    pair = _made(PreferencePair, PAIR | scores, "preference")
    assert pair.scores is None
    with pytest.raises(DataError, match="'rejected_score'") as caught:
        pair.margin()
    assert caught.value.where == "x:1"


@pytest.mark.parametrize(("answer", "right"), [("4", 1), (" 4", 1), (1, 1), (0, 0)])
def test_the_answer_to_a_question_is_one_of_its_choices_or_the_index_of_one(answer: Any, right: int) -> None:
    row = {"id": 7, "task": "sums", "question": "2 + 2?", "choices": ["3", "4 ", "5"], "answer": answer}
    question = Question(messages=RECORDS_ASKED, choices=("3", "4", "5"), right=right, id="7", task="sums")
    assert _made(Question, row, "choices") == question


def _graded(**answers: float) -> dict[str, Any]:
    return {"prompt": "?", "completions": [{"text": text, "score": score} for text, score in answers.items()]}


CHOICES = {"question": "2 + 2?", "choices": ["3", "4", "5"], "answer": "4"}
NO_RECORD: list[tuple[Any, str, Any, str]] = [
    (PreferencePair, "preference", PAIR | {"rejected": None}, "'rejected' must be text"),
    (PreferencePair, "preference", PAIR | {"rejected": " 4."}, "'rejected' is the same as 'chosen'"),
    (PreferencePair, "preference", PAIR | {"messages": [USER, RECORDS_ANSWER]}, "'messages' must end with a user turn"),
    (PreferencePair, "preference", {"prompt": None, "chosen": "4.", "rejected": "5."}, "'prompt' is null"),
    (Prompt, "messages", {"messages": [RECORDS_ANSWER]}, "'messages' must end with a user turn"),
    (LabelledAnswer, "messages", {"messages": [USER, RECORDS_ANSWER]}, "'label' is missing"),
    (LabelledAnswer, "ranked", _graded(a=1, b=2, c=3), "'label' is missing: the row has 3 answers"),
    (LabelledAnswer, "ranked", _graded(a=1, b=1), "same rank"),
    (LabelledAnswer, "text", {"text": "2 + 2 is 4."}, "plain text"),
    (Question, "choices", CHOICES | {"answer": "6"}, "'answer' is '6'"),
    (Question, "choices", CHOICES | {"choices": ["4", "4 ", "5"]}, "'choices' contains '4' twice"),
    (Question, "choices", CHOICES | {"choices": ["4"]}, "'choices' has fewer than two"),
    (Question, "ranked", _graded(a=9, b=9), "'choices' has several best answers"),
    *(
        (PreferencePair, "votes", {"prompt": "2 + 2?", "answers": answers, "preferred": "dpo"}, "'answers' must map")
        for answers in (None, ["4.", "5."], {"dpo": "4."}, {"dpo": "4.", "sft": "5.", "base": "6."})
    ),
]


@pytest.mark.parametrize(("record", "form", "row", "message"), NO_RECORD)
def test_a_row_without_a_record_is_named_by_its_field(record: Any, form: str, row: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        list(record.of(FORMATS[form].read(Fields(row, where="x:1", example=right_form(FORMATS[form], record)))))
    assert caught.value.where == "x:1"
    assert message in caught.value.message
    assert isinstance(caught.value, SetAside) or caught.value.remedy


MISSPELT: list[tuple[Any, str, Any, str, str]] = [
    (
        PreferencePair,
        "preference",
        {"prompt": "a", "choosen": "4.", "rejected": "5."},
        "'chosen' is missing",
        "choosen",
    ),
    (PreferencePair, "preference", {"promt": "a", "chosen": "4.", "rejected": "5."}, "'messages' is missing", "promt"),
    (PreferencePair, "prompt", {"prompt": "a", "choosen": "4.", "rejected": "5."}, "", "{chosen: choosen}"),
    (LabelledAnswer, "prompt_completion", {"prompt": "a", "completion": "4.", "labell": True}, "", "{label: labell}"),
]


@pytest.mark.parametrize(("record", "form", "row", "message", "word"), MISSPELT)
def test_a_misspelt_column_is_named(record: Any, form: str, row: Any, message: str, word: str) -> None:
    with pytest.raises(DataError) as caught:
        list(record.of(FORMATS[form].read(Fields(row, where="x:1", example=""))))
    assert caught.value.message.startswith(message)
    assert word in f"{caught.value.message} {caught.value.remedy}"


def test_scores_that_contradict_a_preference_give_no_margin() -> None:
    pair = _made(PreferencePair, PAIR | {"chosen_score": 1, "rejected_score": 2}, "preference")
    with pytest.raises(DataError, match=r"x:1: .*scores 1, less than the rejected one with 2"):
        pair.margin()
