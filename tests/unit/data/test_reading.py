"""Files as rows, rows as records: every kind of file, every fault named in one pass, and what may be skipped."""

from __future__ import annotations

import csv
import gzip
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from alignment import cli
from alignment.commands.shared.diagnoses import records
from alignment.config.data import DataConfig, OnError
from alignment.core.errors import DataError
from alignment.data.bundled_files import locate
from alignment.data.doctor import examine
from alignment.data.reading import Reading, iterate, read_records, start
from alignment.data.records import Conversation, HeldOutPrompt, PreferencePair, Prompt
from alignment.data.row_files import RawRow, files_of, rows_of

ROWS = [{"instruction": f"Add {number}.", "input": "", "output": f"It is {number}."} for number in range(5)]
ALL = DataConfig(source="")


def _lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write(path: Path) -> None:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.name.endswith(".csv"):
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(_lines(ROWS).encode()))
    else:
        path.write_text(json.dumps(ROWS) if path.name == "list.json" else _lines(ROWS))


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "list.json", "lines.json", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, name: str) -> None:
    _write(tmp_path / name)
    conversations = read_records(tmp_path / name, Conversation, ALL)
    assert [conversation.messages[-1].content for conversation in conversations] == [row["output"] for row in ROWS]
    assert all(conversation.where.startswith(str(tmp_path / name)) for conversation in conversations)


QUESTION, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "{{four}}"}
SHARED = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "{{four}}"}]
LISTS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [QUESTION, ANSWER]},
    "sharegpt": {"conversations": SHARED},
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
    texts = {column: json.dumps(value) if isinstance(value, list) else value for column, value in row.items()}
    files = [tmp_path / "lists.jsonl", tmp_path / f"texts{suffix}"]
    files[0].write_text(_lines([row]))
    if suffix == ".csv":
        with files[1].open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(texts))
            writer.writeheader()
            writer.writerow(texts)
    else:
        parquet.write_table(pa.Table.from_pylist([texts]), files[1])
    settings = replace(ALL, placeholders={"four": 'a "4"'})
    as_lists, as_texts = (read_records(file, record, settings) for file in files)
    assert [start(file, ALL).format.name for file in files] == [name, name]
    assert as_texts == as_lists
    assert len(as_lists) == 1


def test_references_to_the_turns_of_a_csv_are_a_list_like_them(tmp_path: Path) -> None:
    row = {"turns": ["2 + 2?", "Times 3?"], "reference": ["4", "12"]}
    with (tmp_path / "turns.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([row.keys(), map(json.dumps, row.values())])
    (prompt,) = read_records(tmp_path / "turns.csv", HeldOutPrompt, ALL)
    assert prompt.references == ("4", "12")
    assert prompt.row == row, "scorers read lists, too"


@pytest.mark.parametrize("reference", ["[2, 3, 5]", '["2", "3", "5"]'])
def test_a_reference_that_is_no_list_for_the_turns_of_a_csv_stays_text(tmp_path: Path, reference: str) -> None:
    with (tmp_path / "turns.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["turns", "reference"], ['["The first three primes?"]', reference]])
    (prompt,) = read_records(tmp_path / "turns.csv", HeldOutPrompt, ALL)
    assert prompt.reference == reference


@pytest.mark.parametrize("asked", [{"prompt": "Which?"}, {"turns": ["Which?", "Why?"]}])
def test_a_reference_that_is_json_itself_stays_text(tmp_path: Path, asked: dict[str, Any]) -> None:
    (tmp_path / "rows.jsonl").write_text(_lines([asked | {"reference": "[2, 3]"}]))
    (prompt,) = read_records(tmp_path / "rows.jsonl", HeldOutPrompt, ALL)
    assert prompt.reference == "[2, 3]"


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
    (tmp_path / "calls.jsonl").write_text(_lines([CALLS]))
    parquet.write_table(pa.Table.from_pylist([CALLS]), tmp_path / "calls.parquet")
    (written,) = read_records(tmp_path / "calls.jsonl", Conversation, ALL)
    (stored,) = read_records(tmp_path / "calls.parquet", Conversation, ALL)
    assert stored == written
    assert list(stored.tools) == CALLS["tools"]
    assert [call["function"]["arguments"] for turn in stored.messages for call in turn.tool_calls] == [
        {"numbers": [2, 2]},
        {"text": "4"},
    ]
    (row,) = rows_of(tmp_path / "calls.parquet")
    assert isinstance(row, RawRow)
    assert row.value["checked"] == CALLS["checked"], "a column that a scorer may read stays as it is"


def test_a_schema_of_anthropic_has_the_fields_that_it_was_written_with(tmp_path: Path) -> None:
    tools = [{"name": name, "input_schema": {"properties": {name: {"type": "string"}}}} for name in ("place", "time")]
    parquet.write_table(pa.Table.from_pylist([{"messages": [QUESTION], "tools": tools}]), tmp_path / "tools.parquet")
    (prompt,) = read_records(tmp_path / "tools.parquet", Prompt, ALL)
    assert [tool["function"] for tool in prompt.tools] == tools


def test_columns_that_are_called_like_the_fields_of_a_function_keep_their_nulls(tmp_path: Path) -> None:
    rows = [{"prompt": "?", "name": "a", "parameters": None}, {"prompt": None, "name": "b", "parameters": "x"}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [row.value for row in rows_of(tmp_path / "rows.parquet") if isinstance(row, RawRow)] == rows


def test_a_null_that_somebody_wrote_stays(tmp_path: Path) -> None:
    parameters = {"properties": {"unit": {"enum": ["km", None], "default": None}}}
    tools = [{"type": "function", "function": {"name": "far", "parameters": parameters}}]
    row = {"messages": [QUESTION], "tools": tools}
    (tmp_path / "nulls.jsonl").write_text(_lines([row]))
    parquet.write_table(pa.Table.from_pylist([row | {"tools": json.dumps(tools)}]), tmp_path / "text.parquet")
    for name in ("nulls.jsonl", "text.parquet"):
        (prompt,) = read_records(tmp_path / name, Prompt, ALL)
        assert list(prompt.tools) == tools


def test_half_a_character_in_a_list_of_a_csv_is_a_fault_of_its_row(tmp_path: Path) -> None:
    with (tmp_path / "texts.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["messages"], ['[{"role": "user", "content": "\\ud83d"}]']])
    with pytest.raises(DataError, match=r"texts\.csv:2: 'messages' must be a list of turns, or JSON of one"):
        read_records(tmp_path / "texts.csv", Prompt, ALL)


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, row in (("b.jsonl", ROWS[1]), ("a.json", ROWS[0])):
        (tmp_path / name).write_text(json.dumps([row]) if name.endswith(".json") else json.dumps(row))
    (tmp_path / "README.md").write_text("not data")
    assert [path.name for path in files_of(tmp_path)] == ["a.json", "b.jsonl"]
    assert [conversation.messages[-1].content for conversation in read_records(tmp_path, Conversation, ALL)] == [
        "It is 0.",
        "It is 1.",
    ]


def test_lines_of_a_csv_are_counted_where_fields_have_breaks(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('prompt,completion\n"two\nlines",yes\nshort\nb,c\n')
    rows = list(rows_of(file))
    assert isinstance(rows[0], RawRow)
    assert rows[0].value == {"prompt": "two\nlines", "completion": "yes"}
    assert str(rows[1]) == f"{file}:4: does not have 2 fields, as the header does"
    assert isinstance(rows[2], RawRow)
    assert rows[2].where == f"{file}:5"


ARRAY = "a.jsonl: is one JSON array, not JSON Lines\n  → rename it to .json, or write one object per line"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x", "has an unknown file type"),
        ("a.json", b'"x"', "is JSON, but not a list of rows"),
        ("a.json", b'{\n  "data": [\n    {"text": "a"}\n  ]\n}\n', "is JSON, but not a list of rows"),
        ("a.json", b"[1,", "not JSON: "),
        ("a.parquet", b"PAR0", "not Parquet: "),
        ("a.jsonl.gz", b"not packed", "cannot be read or unpacked: "),
        ("a.json.gz", b"not packed", "cannot be read or unpacked: "),
        ("a.csv", b"a\n\xff\n", "not UTF-8: "),
        ("a.csv", b"prompt,chosen,rejected,chosen\n1,2,3,4\n", "has the column 'chosen' twice"),
        ("a.json", b'[{"prompt": 1, "prompt": 2}]', "has the key 'prompt' twice"),
        ("a.jsonl", b'[{"text": "a"}, {"text": "b"}]\n', ARRAY),
        ("a.jsonl", b'\n\xef\xbb\xbf[ {"text": "a"}]', ARRAY),
        ("a.jsonl", b'[\n  {"text": "a"},\n  {"text": "b"}\n]\n', ARRAY),
    ],
)
def test_a_file_that_cannot_be_read_at_all_says_why(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(rows_of(tmp_path / name))
    assert message in str(caught.value)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_of_a_csv_is_that_of_its_header(tmp_path: Path, separator: str) -> None:
    rows = [{"prompt": "2 + 2, and 3?", "completion": "4; 5|6"}, {"prompt": "1\t1", "completion": "2"}]
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    read = list(rows_of(tmp_path / "a.csv"))
    assert [row.value for row in read if isinstance(row, RawRow)] == rows
    assert [row.where for row in read] == [f"{tmp_path / 'a.csv'}:{line}" for line in (2, 3)]


def test_a_column_of_texts_with_semicolons_is_one_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\na; b\n")
    assert [row.value for row in rows_of(tmp_path / "a.csv") if isinstance(row, RawRow)] == [{"text": "a; b"}]


def test_a_key_that_a_row_has_twice_is_a_fault_of_the_row(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"tool": {"text": "b", "text": "c"}}\n')
    first, second = rows_of(file)
    assert isinstance(first, RawRow)
    assert isinstance(second, DataError)
    assert (second.where, "'text'" in second.message) == (f"{file}:2", True)


def test_columns_of_parquet_with_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'text' twice"):
        list(rows_of(tmp_path / "a.parquet"))


@pytest.mark.parametrize("target", ["b.jsonl", "a.jsonl"])
def test_a_link_that_leads_to_no_file_is_named(tmp_path: Path, target: str) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "a.jsonl").symlink_to(target)
    with pytest.raises(DataError, match=r"a\.jsonl"):
        files_of(tmp_path)
    with pytest.raises(DataError) as caught:
        locate(f"path:{tmp_path / 'a.jsonl'}")
    assert "link" in caught.value.remedy
    assert target in caught.value.remedy


def test_json_lines_with_another_suffix_may_begin_with_a_mark_of_their_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')
    assert [row.value for row in rows_of(tmp_path / "a.json") if isinstance(row, RawRow)] == [
        {"text": "a"},
        {"text": "b"},
    ]


def test_an_empty_folder_holds_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="contains no data file"):
        files_of(tmp_path)


ASKED = {"role": "user", "content": "a"}
GOOD = {"messages": [ASKED, {"role": "assistant", "content": "b"}]}
PLANTED: list[tuple[Any, str]] = [
    (b'{"messages": [', "not JSON"),
    (b'{"messages": "\xff"}', "not UTF-8"),
    (b"[1, 2]", "a row must be a JSON object; this one is [1, 2]"),
    (b"null", "a row must be a JSON object; this one is None"),
    (b'"text"', "a row must be a JSON object"),
    (b"NaN", "a row must be a JSON object; this one is nan"),
    (
        {},
        "'messages' is missing; the row has no fields",
    ),
    (
        {"message": []},
        "'messages' is missing; the row has 'message'",
    ),
    ({"messages": None}, "'messages' is null"),
    ({"messages": []}, "'messages' must be a list of turns and not empty; it is []"),
    ({"messages": 7}, "'messages' must be text and not empty; it is 7"),
    ({"messages": {"role": "user"}}, "'messages' must be text and not empty; it is {'role': 'user'}"),
    ({"messages": ["a"]}, "'messages[0]' must be an object with 'role' and 'content'; it is 'a'"),
    ({"messages": [{}]}, "'messages[0].role' must be one of system, user, assistant, tool; it is None"),
    ({"messages": [{**ASKED, "role": "boss"}]}, "'messages[0].role' must be one of"),
    ({"messages": [{**ASKED, "role": 1}]}, "'messages[0].role' must be one of"),
    ({"messages": [{"role": "user"}]}, "'messages[0].content' must be text and not empty; it is None"),
    ({"messages": [{**ASKED, "content": ""}]}, "'messages[0].content' must be text and not empty; it is ''"),
    ({"messages": [{**ASKED, "content": " \n"}]}, "'messages[0].content' must be text and not empty"),
    ({"messages": [{**ASKED, "content": 3}]}, "'messages[0].content' must be text and not empty; it is 3"),
    ({"messages": [{**ASKED, "content": [3]}]}, "'messages[0].content' must have parts that are text or tool calls"),
    ({"messages": [ASKED]}, "'messages' must end with an assistant turn; the last one's role is 'user'"),
    ({"messages": [*GOOD["messages"], ASKED]}, "'messages' must end with an assistant turn"),
    ({"messages": [ASKED, {**ASKED, "role": "system"}]}, "'messages[1].role' is 'system'; only the first turn may be"),
    ({"messages": [ASKED, {"role": "assistant", "content": None}]}, "'messages[1].content' must be text"),
    ({"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [{}]}]}, "must have a function with a"),
    ({"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": "x"}]}, "tool_calls' must be a list"),
    ({**GOOD, "tools": "{"}, "'tools' must be JSON; it is '{'"),
    ({**GOOD, "tools": {"name": "x"}}, "'tools' must be a list of tools"),
    ({"messages": [{**ASKED, "content": "x" * 2_000_000}]}, "'messages' must end with an assistant turn"),
]


def _planted(folder: Path) -> Path:
    file = folder / "rows.jsonl"
    lines = [json.dumps(GOOD).encode()] * 3
    for content, _ in PLANTED:
        lines += [content if isinstance(content, bytes) else json.dumps(content).encode(), json.dumps(GOOD).encode()]
    file.write_bytes(b"\n".join(lines))
    return file


def test_a_fault_of_many_rows_is_told_once(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n" + '{"messages": 3}\n' * 3 + '{"messages": []}\n')
    with pytest.raises(DataError) as caught:
        list(iterate(file, Conversation, ALL, reading=start(file, ALL)))
    head, first, second = str(caught.value).splitlines()[:3]
    assert head == "4 faulty rows:"
    assert first.startswith(f"  {file}:2 and 2 other rows: 'messages' ")
    assert second.startswith(f"  {file}:5: 'messages' ")


def test_thirty_planted_faults_are_all_found_in_one_pass(tmp_path: Path) -> None:
    file = _planted(tmp_path)
    assert len(PLANTED) == 30
    reading, faults = start(file, ALL), list[DataError]()
    reading.on_left_out = faults.append
    with pytest.raises(DataError) as caught:
        list(iterate(file, Conversation, ALL, reading=reading))
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith("30 faulty rows:\n")
    assert "and 10 more" in str(caught.value)
    for number, (fault, (_, message)) in enumerate(zip(faults, PLANTED, strict=True)):
        assert fault.where == f"{file}:{4 + 2 * number}"
        assert message in fault.message
        assert len(fault.message) < 300, "a value is shortened"
        assert fault.remedy


def test_each_kind_of_fault_gets_its_advice_and_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    file.write_text(f'{good}\n{{"messages": 3}}\n{good[:-3]}\n')
    with pytest.raises(DataError) as caught:
        read_records(file, Conversation, DataConfig(source=""))
    advice = [line.strip() for line in str(caught.value).splitlines() if "→" in line]
    assert advice[0].startswith("→ a row of the right form: ")
    assert advice[1] == "→ write one JSON object per line (JSON Lines)"
    way_out = "data.on_error=skip data.max_skipped=0.67 leave out the faulty ones"
    assert advice[2:] == [f"→ `align doctor {file}` checks all rows; {way_out}"]


def test_nobody_is_told_to_leave_out_all_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(_lines([{"messages": 3}] * 3))
    with pytest.raises(DataError) as caught:
        read_records(file, Conversation, DataConfig(source=""))
    assert "on_error" not in str(caught.value)


def test_the_command_that_checks_all_rows_reads_them_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my rows.jsonl"
    file.write_text(_lines([{"q": "2 + 2?", "a": "4."}, {"q": "Who is {{name}}?", "a": 5}]))
    data = DataConfig(source="", columns={"prompt": "q", "completion": "a"}, placeholders={"name": "Ada"}, limit=2)
    with pytest.raises(DataError) as caught:
        read_records(file, Conversation, data)
    command = str(caught.value).partition("`")[2].partition("`")[0]
    words = ["align", "doctor", str(file), "columns={prompt: q, completion: a}", "placeholders={name: Ada}"]
    assert shlex.split(command) == words
    assert cli.main(shlex.split(command)[1:]) == 3
    assert "my rows.jsonl:2: 'completion' must be text and not empty; it is 5" in capsys.readouterr().out


def test_faulty_rows_may_be_skipped_up_to_a_share_and_are_listed(tmp_path: Path) -> None:
    file = _planted(tmp_path)
    skip = DataConfig(source="", on_error=OnError.skip, max_skipped=0.5)
    reading = start(file, skip)
    assert len(list(iterate(file, Conversation, skip, reading=reading))) == 33
    assert [fault.where for fault in reading.faults.first] == [f"{file}:{4 + 2 * number}" for number in range(20)]
    assert reading.faults.count == 30
    with pytest.raises(DataError, match=r"more than 5% of 63 rows are faulty; 30 faulty rows:"):
        read_records(file, Conversation, DataConfig(source="", on_error=OnError.skip))


def test_a_share_that_holds_for_the_file_is_not_judged_by_its_first_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(_lines([*[{"messages": 3}] * 2, *[GOOD] * 6]))
    few = DataConfig(source="", on_error=OnError.skip, max_skipped=0.25, limit=1)
    assert len(read_records(file, Conversation, few)) == 1
    assert len(read_records(file, Conversation, replace(few, limit=None))) == 6
    with pytest.raises(DataError, match=r"more than 24% of 8 rows are faulty"):
        read_records(file, Conversation, replace(few, limit=None, max_skipped=0.24))


def test_faults_name_the_setting_and_the_rows_that_were_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(_lines([*[{"messages": 3}] * 2, *[GOOD] * 38]))

    def refused(data: DataConfig) -> list[str]:
        with pytest.raises(DataError) as caught:
            read_records(file, Conversation, data, reading=start(file, data, setting="stages.sft.data"))
        return str(caught.value).splitlines()

    lines = refused(DataConfig(source="", limit=1))
    assert lines[0] == "stages.sft.data: 2 faulty rows among the first 3 rows:"
    assert lines[-1] == (
        f"  → `align doctor {file}` checks all rows; stages.sft.data.on_error=skip leaves out the faulty ones, if they "
        "are at most 5% of the file (stages.sft.data.max_skipped)"
    )
    lines = refused(DataConfig(source=""))
    assert lines[0] == "stages.sft.data: 2 faulty rows:"
    assert lines[-1].endswith("; stages.sft.data.on_error=skip leaves out the faulty ones")
    lines = refused(DataConfig(source="", on_error=OnError.skip, max_skipped=0.01))
    assert lines[0] == "stages.sft.data: more than 1% of 40 rows are faulty; 2 faulty rows:"
    assert lines[-1] == "  → fix the rows, or set stages.sft.data.max_skipped=0.05"


def test_columns_of_other_names_are_told(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(_lines([{"q": "2 + 2?", "good": "4.", "bad": "5.", "prompt": "unrelated"}]))
    data = DataConfig(source="", columns={"prompt": "q", "chosen": "good", "rejected": "bad"})
    (pair,) = read_records(file, PreferencePair, data)
    assert (pair.messages[0].content, pair.chosen, pair.rejected) == ("2 + 2?", "4.", "5.")
    file.write_text(_lines([{"q": "2 + 2?"}]))
    with pytest.raises(DataError, match="no known format has the columns 'q'"):
        read_records(file, PreferencePair, ALL)


def test_placeholders_are_filled_everywhere_and_others_left(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        _lines([{"messages": [{**ASKED, "content": "{{name}}?"}, *GOOD["messages"][1:]], "n": "{{other}}"}])
    )
    diagnosis = examine(file, ALL, records())
    assert dict(diagnosis.placeholders) == {"name": 1, "other": 1}
    data = DataConfig(source="", placeholders={"name": "Ada"})
    (conversation,) = read_records(file, Conversation, data)
    assert conversation.messages[0].content == "Ada?"
    assert dict(examine(file, data, records()).placeholders) == {"other": 1}


def test_a_file_of_which_all_rows_are_set_aside_says_why(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(_lines([{"prompt": "a", "completion": "b", "label": False}] * 2))
    with pytest.raises(DataError) as caught:
        read_records(file, Conversation, ALL)
    assert "contains no usable row: all 2 rows were set aside ('label' says that the answer is bad" in str(caught.value)


def test_a_limit_counts_records_and_faults_behind_it_are_not_looked_for(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(_lines([GOOD, GOOD, {"messages": []}]))
    assert len(read_records(file, Conversation, DataConfig(source="", limit=2))) == 2
    reading = Reading(path=file, format=start(file, ALL).format)
    with pytest.raises(DataError):
        list(iterate(file, Conversation, ALL, reading=reading))


def test_the_doctor_says_what_each_stage_can_make_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    pair = {"prompt": "2 + 2?", "chosen": "4.", "rejected": "5."}
    file.write_text(_lines([pair, pair, {**pair, "rejected": "4."}, {**pair, "prompt": ""}]))
    diagnosis = examine(file, ALL, records())
    assert diagnosis.format.name == "preference"
    assert diagnosis.meant_for == ["sft", "reward, dpo", "kto", "ppo, distil", "evaluate"]
    uses = {name: (use.records, use.repeated, diagnosis.faulty.count([name])) for name, use in diagnosis.uses.items()}
    assert uses == {
        "sft": (3, 2, 1),
        "reward, dpo": (2, 1, 2),
        "kto": (4, 2, 2),
        "ppo, distil": (3, 2, 1),
        "evaluate": (3, 2, 1),
    }
    assert sorted(fault.where for fault in diagnosis.faults) == [f"{file}:3", f"{file}:4"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(_lines([{"prompt": "a"}, {"prompt": "b"}]))
    assert examine(prompts, ALL, records()).meant_for == ["ppo, distil", "evaluate"]
    assert not examine(prompts, ALL, records()).faults


@pytest.mark.parametrize(
    ("stage", "good", "bad"),
    [
        ("evaluate", {"messages": [ASKED], "reference": "4."}, {"messages": []}),
        ("forgetting", {"question": "2 + 2?", "choices": ["3", "4"], "answer": "4"}, {"choices": ["4"]}),
    ],
)
def test_the_doctor_knows_what_measuring_stages_refuse(
    tmp_path: Path, stage: str, good: dict[str, Any], bad: dict[str, Any]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(_lines([good, good | bad, good]))
    diagnosis = examine(file, ALL, records())
    assert stage in diagnosis.meant_for
    assert diagnosis.uses[stage].records == 2
    assert [fault.where for fault in diagnosis.faults] == [f"{file}:2"]


def test_half_a_surrogate_pair_is_a_fault_of_its_row(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a \\ud83d b", "completion": "c"}\n{"prompt": "\\ud83d\\ude00", "completion": "d"}\n')
    first, second = rows_of(file)
    assert isinstance(first, DataError)
    assert first.where == f"{file}:1"
    assert isinstance(second, RawRow)
    assert second.value["prompt"] == "\U0001f600"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_surrogates_that_are_encoded_like_characters_are_not_utf8(tmp_path: Path, name: str) -> None:
    """As Java and Oracle write emoji (CESU-8). Tokenizers refuse such text, long after the row was read."""
    file = tmp_path / name
    row = b'{"prompt": "a \xed\xa0\xbd\xed\xb8\x80", "completion": "c"}\n'
    file.write_bytes(row + b'{"prompt": "b", "completion": "d"}\n')
    first, second = rows_of(file)
    assert isinstance(first, DataError)
    assert first.where == f"{file}:1"
    assert first.message == "not UTF-8: byte 0xed at column 15 (half of a surrogate pair, as in CESU-8)"
    assert isinstance(second, RawRow)


def test_values_of_parquet_that_python_cannot_hold_are_faults_of_their_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    latin = pa.Array.from_buffers(pa.string(), 2, pa.array([b"caf\xe9", b"tea"]).buffers())
    late = pa.array([0, 300_000 * 366 * 86_400], pa.timestamp("s"))  # in the year 300,000
    columns = {"prompt": ["a", "b", "c", "d"], "completion": pa.concat_arrays([latin, pa.array(["x", "y"])])}
    parquet.write_table(pa.table({**columns, "seen": pa.concat_arrays([late.take([0, 0]), late])}), file)
    rows = list(rows_of(file))
    assert [type(row) for row in rows] == [DataError, RawRow, RawRow, DataError]
    faults = [row for row in rows if isinstance(row, DataError)]
    assert [fault.where for fault in faults] == [f"{file}: row 1", f"{file}: row 4"]
    assert [fault.message.partition(": ")[0] for fault in faults] == [
        "has a value in column 'completion' that cannot be read",
        "has a value in column 'seen' that cannot be read",
    ]


def test_an_unknown_time_zone_of_parquet_is_a_fault_of_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    seen = pa.array([0], pa.timestamp("us", tz="Mars/Phobos"))
    parquet.write_table(pa.table({"prompt": ["a"], "seen": seen}), file)
    (fault,) = rows_of(file)
    assert isinstance(fault, DataError)
    assert fault.message.startswith("has a value in column 'seen' that cannot be read: ")


def test_the_first_row_of_a_csv_stands_in_its_second_line(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("prompt,chosen,rejected\nHi.,,No.\nHi.,Yes.,No.\n")
    with pytest.raises(DataError, match="'chosen'") as caught:
        read_records(file, PreferencePair, ALL)
    assert caught.value.where == f"{file}:2"


def test_a_column_that_no_row_has_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(_lines([{"q": "Hi.", "a": "Hello."}]))
    data = DataConfig(source="", columns={"prompt": "q", "completion": "nosuch"})
    with pytest.raises(DataError, match="names the column 'nosuch', which no row has") as caught:
        read_records(file, Conversation, data)
    assert caught.value.remedy == "the columns are a, q"


def test_a_column_may_appear_for_the_first_time_after_many_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    row = {"q": "Hi.", "a": "Hello."}
    file.write_text(_lines([row] * 150 + [row | {"about": "Be kind."}, row]))
    columns = {"prompt": "q", "completion": "a", "system": "about"}
    conversations = read_records(file, Conversation, DataConfig(source="", columns=columns))
    systems = [conversation.messages[0].content for conversation in conversations]
    assert systems == ["Hi."] * 150 + ["Be kind.", "Hi."]
    with pytest.raises(DataError, match="names the column 'nosuch', which no row has"):
        read_records(file, Conversation, DataConfig(source="", columns=columns | {"tools": "nosuch"}))


@pytest.mark.parametrize("share", [0.29, 0.57, 0.58])
def test_the_share_that_an_error_names_is_enough(tmp_path: Path, share: float) -> None:
    """.29 * 100 is 28.999999999999996."""
    file = tmp_path / "a.jsonl"
    faulty = round(100 * share)
    good = {"prompt": "Hi.", "completion": "Hello."}
    file.write_text(_lines([good] * (100 - faulty) + [good | {"completion": 3}] * faulty))
    with pytest.raises(DataError) as caught:
        read_records(file, Conversation, DataConfig(source="", on_error=OnError.skip, max_skipped=0.1))
    assert f"max_skipped={share:g}" in caught.value.remedy
    named = DataConfig(source="", on_error=OnError.skip, max_skipped=share)
    assert len(read_records(file, Conversation, named)) == 100 - faulty


PAIR = {"prompt": "Hi.", "chosen": "Yes.", "rejected": "No."}


@pytest.mark.parametrize(
    ("faulty", "count"),
    [({"chosen": None}, 6), ({"chosen": None}, 9), ({"rejected": "Yes."}, 7), ({"chosen": None}, 12)],
)
def test_rows_are_faulty_however_many_they_are(tmp_path: Path, faulty: dict[str, Any], count: int) -> None:
    file = tmp_path / "a.jsonl"
    rows = [PAIR | {"prompt": f"{number}?"} | (faulty if number < count else {}) for number in range(12)]
    file.write_text(_lines(rows))
    diagnosis = examine(file, DataConfig(source="", format="preference" if count == 12 else None), records())
    assert diagnosis.format.name == "preference"
    assert [fault.where for fault in diagnosis.faults] == [f"{file}:{line}" for line in range(1, count + 1)]
