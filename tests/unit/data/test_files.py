"""Files of every kind as rows with their lines, what cannot be a row, bounds on size, and a hub's data set."""

from __future__ import annotations

import csv
import gzip
import json
import os
import tracemalloc
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from alignment.config.data import DataConfig, SourceConfig
from alignment.core.errors import DataError
from alignment.data import caps
from alignment.data.chat_template import template_text
from alignment.data.reading import read_records
from alignment.data.records import Conversation
from alignment.data.row_files import NotUtf8, RawRow, files_of, rows_of
from alignment.data.source_files import hub_rows, locate
from tests.hub import NAME, leave_data_set, use_cache

ROWS = [{"prompt": f"Add {number} to it.", "completion": f"It is {number} more."} for number in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
FIRST = LINES.splitlines(keepends=True)[0]
ROW = json.dumps({"prompt": "2 + 2?", "completion": "4."})
ALL = DataConfig(source="")


def _parquet(rows: list[Any]) -> bytes:
    sink = BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def _csv(path: Path, rows: list[dict[str, Any]], separator: str = ",") -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


def _values(file: Path) -> list[Any]:
    rows = list(rows_of(file))
    assert all(isinstance(row, RawRow) for row in rows)
    return [row.value for row in rows if isinstance(row, RawRow)]


def _outcomes(file: Path) -> list[str]:
    rows: list[Any] = []
    try:
        rows.extend(rows_of(file))
    except DataError as error:
        rows.append(error)
    outcomes = [row.where if isinstance(row, RawRow) else f"{row.where}: {row.message}" for row in rows]
    return [outcome.removeprefix(f"{file}:").strip() for outcome in outcomes]


KINDS: dict[str, bytes] = {
    "a.jsonl": LINES.encode(),
    "a.ndjson": LINES.encode(),
    "list.json": json.dumps(ROWS).encode(),
    "lines.json": b"\xef\xbb\xbf" + LINES.encode(),
    "a.csv": ("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS)).encode(),
    "a.parquet": _parquet(ROWS),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(KINDS[name])
    assert _values(tmp_path / name) == ROWS
    assert all(str(row.where).startswith(str(tmp_path / name)) for row in rows_of(tmp_path / name))


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="contains no data file"):
        files_of(tmp_path)
    (tmp_path / "b.jsonl").write_text(FIRST)
    (tmp_path / "a.json").write_text(json.dumps(ROWS[1:2]))
    (tmp_path / "README.md").write_text("not data")
    assert [path.name for path in files_of(tmp_path)] == ["a.json", "b.jsonl"]
    records = read_records(tmp_path, Conversation, ALL)
    assert [record.messages[-1].content for record in records] == ["It is 1 more.", "It is 0 more."]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_of_a_csv_is_that_of_its_header(tmp_path: Path, separator: str) -> None:
    rows = [{"prompt": "2 + 2, and 3?", "completion": "4; 5|6"}, {"prompt": "1\t1", "completion": "2"}]
    _csv(tmp_path / "a.csv", rows, separator)
    assert _values(tmp_path / "a.csv") == rows
    _csv(tmp_path / "b.csv", [{"text": "a; b"}])
    assert _values(tmp_path / "b.csv") == [{"text": "a; b"}]


FILE_FAULTS = [
    ("a.txt", b"x", "has an unknown file type"),
    ("a.json", b'{\n  "data": [\n    {"text": "a"}\n  ]\n}\n', "not a list of rows"),
    ("a.json", b'[\n{"a": 1},\n{"a": }\n]\n', "a.json:3: not JSON: Expecting value at column 7"),
    ("a.parquet", b"PAR0", "not Parquet: "),
    ("a.jsonl.gz", b"not packed", "cannot be read or unpacked: "),
    ("a.csv", b"prompt,chosen,rejected,chosen\n1,2,3,4\n", "has the column 'chosen' twice"),
    ("a.json", b'[{"prompt": 1, "prompt": 2}]', "has the key 'prompt' twice"),
    ("a.jsonl", b'\n\xef\xbb\xbf[ {"text": "a"}]', "a.jsonl: is one JSON array"),
    *(
        (f"a.{suffix}", '{"a": "b"}\n'.encode(encoding), f"iconv -f {encoding.upper()} -t UTF-8 ")
        for suffix in ("jsonl", "csv")
        for encoding in ("utf-16", "utf-32")
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), FILE_FAULTS)
def test_a_file_that_cannot_be_read_at_all_says_why(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(rows_of(tmp_path / name))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / name}:")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "not JSON: Expecting ',' delimiter at column 8"),
        (b'{"a": "1\n', "not JSON: Unterminated string starting at column 7"),
        ('{"a": "größer"}\n'.encode("latin-1"), "not UTF-8: byte 0xf6 at column 10 ('ö' in Latin-1)"),
        (b'{"a": "b \xed\xa0\xbd"}', "not UTF-8: byte 0xed at column 10 (half of a surrogate pair, as in CESU-8)"),
        (b'{"a": "b \\ud83d c"}', "half of a surrogate pair"),
        (b'{"tool": {"a": "b", "a": "c"}}', "has the key 'a' twice"),
    ],
)
def test_a_line_that_cannot_be_read_is_a_fault_and_others_are_rows(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"a": "größer"}\n\n{"a": "\\ud83d\\ude00"}\n'.encode() + line)
    *rows, error = rows_of(tmp_path / "a.jsonl")
    assert isinstance(error, DataError)
    assert isinstance(error, NotUtf8) == message.startswith("not UTF-8")
    assert error.where == f"{tmp_path / 'a.jsonl'}:4"
    assert message in error.message
    assert [row.value["a"] for row in rows if isinstance(row, RawRow)] == ["größer", "\U0001f600"]


def test_values_of_parquet_that_python_cannot_hold_are_faults_of_their_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    latin = pa.Array.from_buffers(pa.string(), 2, pa.array([b"caf\xe9", b"tea"]).buffers())
    late = pa.array([0, 300_000 * 366 * 86_400], pa.timestamp("s"))  # in the year 300,000
    columns = {"prompt": ["a", "b", "c", "d"], "completion": pa.concat_arrays([latin, pa.array(["x", "y"])])}
    parquet.write_table(pa.table({**columns, "seen": pa.concat_arrays([late.take([0, 0]), late])}), file)
    assert [outcome.partition(" that ")[0] for outcome in _outcomes(file)] == [
        "row 1: has a value in column 'completion'",
        "row 2",
        "row 3",
        "row 4: has a value in column 'seen'",
    ]
    parquet.write_table(pa.table({"a": ["a"], "seen": pa.array([0], pa.timestamp("us", tz="Mars/Phobos"))}), file)
    assert _outcomes(file)[0].startswith("row 1: has a value in column 'seen' that cannot be read: ")
    parquet.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), file)
    with pytest.raises(DataError, match="'text' twice"):
        list(rows_of(file))


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


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_a_small_packed_file_cannot_fill_the_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caps, "ALWAYS_BYTES", 2 << 20)
    monkeypatch.setattr(caps, "LINE_BYTES", 1 << 20)
    (tmp_path / name).write_bytes(gzip.compress(b"0" * (24 << 20)))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"unpacks to more than 200 times its size|is longer than 1 MiB"):
        read_records(tmp_path / name, Conversation, ALL)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(f"{ROW}\n".encode() * 2_000))
    assert len(read_records(tmp_path / "b.jsonl.gz", Conversation, ALL)) == 2_000


def test_what_must_be_read_in_one_piece_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the Parquet file, a value stands once and is meant a thousand times."""
    monkeypatch.setattr(caps, "WHOLE_BYTES", 1 << 20)
    (tmp_path / "a.json").write_text(f"[{ROW}]" + " " * (1 << 20))
    with pytest.raises(DataError, match=r"a\.json: is longer than 1 MiB"):
        list(rows_of(tmp_path / "a.json"))
    parquet.write_table(pa.table({"text": ["x" * 10_000] * 1_000}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    with pytest.raises(DataError, match="rows 1 to 1000: are too large"):
        list(rows_of(tmp_path / "a.parquet"))
    (tmp_path / "a.jinja").write_bytes(b"0" * ((1 << 20) + 1))
    with pytest.raises(DataError, match=r"a\.jinja .*is longer than 1 MiB"):
        template_text(f"path:{tmp_path / 'a.jinja'}")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_file_that_may_never_end_is_refused_before_it_is_opened(kind: str, tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv", "a.jsonl.gz", "a.parquet", "a.jinja"):
        if kind == "pipe":
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).symlink_to("/dev/zero")
        with pytest.raises(DataError, match=rf"{name}.*: (it )?is not a regular file"):
            template_text(f"path:{tmp_path / name}") if name == "a.jinja" else locate(f"path:{tmp_path / name}")


@pytest.mark.parametrize("levels", [101, 100_000])
def test_brackets_in_brackets_are_a_faulty_row_whatever_reads_them(levels: int, tmp_path: Path) -> None:
    nested = "[" * levels + "]" * levels
    (tmp_path / "a.jsonl").write_text(f'{{"messages": {nested}}}\n{{"a": {"[" * 99 + "]" * 99}}}\n')
    deep, allowed = _outcomes(tmp_path / "a.jsonl")
    assert deep.startswith("1: ")
    assert allowed == "2"
    turns = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "[" * 100_000}]
    (tmp_path / "b.jsonl").write_text(json.dumps({"conversations": turns}))
    with pytest.raises(DataError, match=r"'conversations\[1\].value' must be JSON"):
        read_records(tmp_path / "b.jsonl", Conversation, ALL)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_cache(monkeypatch, tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "list.json", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_a_data_set_gives_its_rows_in_order_with_their_numbers(cache: Path, name: str) -> None:
    folder = leave_data_set(
        cache, {f"data/train-1{Path(name).suffix if '.gz' not in name else '.jsonl.gz'}": KINDS[name]}
    )
    rows = list(hub_rows(folder, "train", None))
    assert [row.value for row in rows] == ROWS
    assert [row.where for row in rows] == [f"{NAME} train: row {number}" for number in range(1, 5)]
    conversations = read_records(folder, Conversation, SourceConfig())
    assert [conversation.messages[-1].content for conversation in conversations] == [row["completion"] for row in ROWS]
    assert conversations[2].where == f"{NAME} train: row 3"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_tools_have_the_parameters_that_they_were_written_with(cache: Path, suffix: str) -> None:
    """``datasets`` reads Parquet into Arrow, where each tool has the parameters of all; columns of JSON may stay."""
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"properties": {name: {"type": "string"}}}}}
        for name in ("place", "time")
    ]
    row = {"prompt": "Where?", "completion": "Here.", "tools": tools, "name": None, "arguments": "x"}
    content = json.dumps(row).encode() if suffix == "jsonl" else _parquet([row])
    folder = leave_data_set(cache, {f"data/train.{suffix}": content})
    (conversation,) = read_records(folder, Conversation, SourceConfig())
    assert list(conversation.tools) == tools
    (raw,) = hub_rows(folder, "train", None)
    assert raw.value == row, "columns that are called like the fields of a call keep their nulls"


README = """---
license: mit
configs:
- config_name: short
  data_files:
  - {split: train, path: data/train.jsonl}
  - {split: test, path: "data/test*.jsonl"}
- config_name: long
  data_files: long/*.jsonl
---
# A data set
"""
DESCRIBED = {"README.md": README, "data/train.jsonl": LINES, "data/test-0.jsonl": FIRST, "long/a.jsonl": LINES * 2}


@pytest.mark.parametrize(
    ("split", "subset", "words"),
    [
        ("validation", "short", ["'validation'", "train, test", "data.split=NAME"]),
        ("train", "shirt", ["'shirt'", "short, long", "data.subset=NAME"]),
        ("train", None, ["short, long", "data.subset=NAME"]),
    ],
)
def test_a_split_or_subset_that_is_not_there_is_refused_with_those_that_are(
    cache: Path, split: str, subset: str | None, words: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        list(hub_rows(leave_data_set(cache, DESCRIBED), split, subset))
    assert (caught.value.where, caught.value.exit_code) == (NAME, 3)
    assert all(word in str(caught.value) for word in words)


ONE_SUBSET = "---\nconfigs:\n- config_name: a\n  data_files: {}\n---\n"


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"train.jsonl": LINES + "{\n"}, "cannot be read: "),
        ({"train.parquet": b"PAR0"}, "cannot be read: "),
        ({"README.md": ONE_SUBSET.format("absent.jsonl"), "train.jsonl": LINES}, "cannot be read: "),
        ({"README.md": ONE_SUBSET.format("../../../../secret.jsonl"), "train.jsonl": LINES}, "outside the repository"),
        ({"README.md": ONE_SUBSET.format("{cache}/secret.jsonl"), "train.jsonl": LINES}, "outside the repository"),
    ],
    ids=["cut off", "not Parquet", "absent", "above", "elsewhere"],
)
def test_a_data_set_that_cannot_be_read_is_refused(cache: Path, files: dict[str, str | bytes], problem: str) -> None:
    (cache / "secret.jsonl").write_text(LINES)
    if isinstance(readme := files.get("README.md"), str):
        files = files | {"README.md": readme.replace("{cache}", str(cache))}
    with pytest.raises(DataError, match=problem) as caught:
        list(hub_rows(leave_data_set(cache, files), "train", None))
    assert str(caught.value).startswith(NAME)
