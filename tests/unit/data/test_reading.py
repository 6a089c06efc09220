"""Rows as records: lists that are written as text, every fault named in one pass, and what may be skipped."""

from __future__ import annotations

import csv
import json
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
from alignment.data.reading import iterate, read_records, start
from alignment.data.records import Conversation, HeldOutPrompt, PreferencePair, Prompt
from alignment.data.row_files import RawRow, rows_of

ALL = DataConfig(source="")
SKIP = DataConfig(source="", on_error=OnError.skip)


def _lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _written(file: Path, rows: list[Any]) -> Path:
    """The file with these rows; the lists and objects of a CSV are the text of their JSON."""
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


# ---- lists and nested fields in files without them ------------------------------------------------------------------

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


@pytest.mark.parametrize(
    ("suffix", "row", "references"),
    [
        (".csv", {"turns": ["2 + 2?", "Times 3?"], "reference": ["4", "12"]}, ("4", "12")),
        (".csv", {"turns": ["The first primes?"], "reference": "[2, 3, 5]"}, ("[2, 3, 5]",)),
        (".csv", {"turns": ["The first primes?"], "reference": '["2", "3"]'}, ('["2", "3"]',)),
        (".jsonl", {"prompt": "Which?", "reference": "[2, 3]"}, ("[2, 3]",)),
        (".jsonl", {"turns": ["Which?", "Why?"], "reference": "[2, 3]"}, ("[2, 3]", "")),
    ],
)
def test_a_reference_is_a_list_only_if_it_fits_the_turns_of_a_csv(
    tmp_path: Path, suffix: str, row: dict[str, Any], references: tuple[str, ...]
) -> None:
    (prompt,) = read_records(_written(tmp_path / f"a{suffix}", [row]), HeldOutPrompt, ALL)
    assert prompt.references == references
    assert prompt.row == row, "scorers read lists, too"


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


# ---- faults ---------------------------------------------------------------------------------------------------------

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
    """Three good rows, then each fault with a good row behind it."""
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


def test_faults_name_the_setting_and_the_rows_that_were_read(tmp_path: Path) -> None:
    file = _written(tmp_path / "rows.jsonl", [*[BAD] * 2, *[GOOD] * 38])

    def refused(data: DataConfig) -> tuple[str, str]:
        reading = start(file, data, setting="stages.sft.data")
        first, *_, last = str(_refused(file, data, reading=reading)).splitlines()
        return first, last

    first, last = refused(replace(ALL, limit=1))
    assert first == "stages.sft.data: 2 faulty rows among the first 3 rows:"
    assert "stages.sft.data.on_error=skip" in last
    assert "(stages.sft.data.max_skipped)" in last
    first, last = refused(ALL)
    assert first == "stages.sft.data: 2 faulty rows:"
    assert last.endswith("; stages.sft.data.on_error=skip leaves out the faulty ones")
    first, last = refused(replace(SKIP, max_skipped=0.01))
    assert first == "stages.sft.data: more than 1% of 40 rows are faulty; 2 faulty rows:"
    assert last.endswith("stages.sft.data.max_skipped=0.05")


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


# ---- columns and placeholders ---------------------------------------------------------------------------------------


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
