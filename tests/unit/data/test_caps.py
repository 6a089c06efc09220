"""Files that would fill the memory or never end: each is refused, and by its size, not by a clock."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from alignment.config.data import DataConfig
from alignment.core.errors import DataError
from alignment.data import caps
from alignment.data.bundled_files import locate
from alignment.data.chat_template import template_text
from alignment.data.reading import read_records
from alignment.data.records import Conversation
from alignment.data.row_files import RawRow, rows_of

ROW = json.dumps({"prompt": "2 + 2?", "completion": "4."})
ZEROS = b"0" * (1 << 20)


def _bomb(path: Path, mebibytes: int) -> None:
    """A line of zeros, packed to a thousandth."""
    with gzip.open(path, "wb", compresslevel=9) as stream:
        for _ in range(mebibytes):
            stream.write(ZEROS)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_a_small_packed_file_cannot_fill_the_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caps, "ALWAYS_BYTES", 2 << 20)
    monkeypatch.setattr(caps, "LINE_BYTES", 1 << 20)
    _bomb(tmp_path / name, 24)
    tracemalloc.start()
    with pytest.raises(DataError) as caught:
        read_records(tmp_path / name, Conversation, DataConfig(source=""))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "unpacks to more than 200 times its size" in str(caught.value) or "is longer than 1 MiB" in str(caught.value)
    assert peak < 20 << 20


def test_rows_that_pack_well_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(f"{ROW}\n".encode() * 2_000))
    assert len(read_records(tmp_path / "a.jsonl.gz", Conversation, DataConfig(source=""))) == 2_000


def test_a_line_that_is_too_long_is_a_faulty_row_and_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caps, "LINE_BYTES", 100)
    (tmp_path / "a.jsonl").write_text(f"{ROW}\n{'x' * 1_000}\n{ROW}\n{'y' * 101}")
    rows = list(rows_of(tmp_path / "a.jsonl"))
    assert [row.where if isinstance(row, RawRow) else str(row).split("\n")[0] for row in rows] == [
        f"{tmp_path / 'a.jsonl'}:1",
        f"{tmp_path / 'a.jsonl'}:2: is longer than 100 bytes",
        f"{tmp_path / 'a.jsonl'}:3",
        f"{tmp_path / 'a.jsonl'}:4: is longer than 100 bytes",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,completion\na," + "x" * 200, ":2: is longer than 100 bytes"),
        ("a.csv", 'prompt,completion\na,"' + "line\n" * 50, ":2: not CSV: field larger than field limit (100)"),
        (
            "a.json",
            f"[{ROW}, {ROW}]" + " " * 300,
            ": is longer than 300 bytes, and a JSON list must be read in one piece",
        ),
    ],
)
def test_other_files_have_bounds_too(
    name: str, content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caps, "LINE_BYTES", 100)
    monkeypatch.setattr(caps, "WHOLE_BYTES", 300)
    (tmp_path / name).write_text(content)
    try:
        faults = [row for row in rows_of(tmp_path / name) if isinstance(row, DataError)]
    except DataError as error:
        faults = [error]
    assert f"{name}{message}" in str(faults[0])


def test_parquet_that_unpacks_to_more_than_memory_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that stands there once and is meant a thousand times."""
    monkeypatch.setattr(caps, "WHOLE_BYTES", 1 << 20)
    parquet.write_table(pa.table({"text": ["x" * 10_000] * 1_000}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    with pytest.raises(DataError, match="rows 1 to 1000: are too large for memory"):
        list(rows_of(tmp_path / "a.parquet"))


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_file_that_may_never_end_is_refused_before_it_is_opened(kind: str, tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv", "a.jsonl.gz", "a.parquet", "a.jinja"):
        if kind == "pipe":
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).symlink_to("/dev/zero")
        with pytest.raises(DataError, match=rf"{name}.*: (it )?is not a regular file"):
            template_text(f"path:{tmp_path / name}") if name == "a.jinja" else locate(f"path:{tmp_path / name}")


def test_a_template_of_megabytes_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_bytes(ZEROS + b"0")
    with pytest.raises(DataError, match=r"a\.jinja cannot be read: it is longer than 1 MiB"):
        template_text(f"path:{tmp_path / 'a.jinja'}")


def _nested(levels: int) -> Any:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("levels", [101, 900, 100_000])
def test_brackets_in_brackets_are_a_faulty_row_whatever_reads_them(levels: int, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"messages": {_nested(levels)}}}\n{{"a": {_nested(99)}}}\n')
    deep, allowed = rows_of(tmp_path / "a.jsonl")
    assert isinstance(deep, DataError)
    assert "a.jsonl:1: " in str(deep)
    assert isinstance(allowed, RawRow)


def test_json_in_a_field_may_be_as_deep_as_a_row(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": _nested(100_000)}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turns}))
    with pytest.raises(DataError, match=r"'conversations\[1\].value' must be JSON"):
        read_records(tmp_path / "a.jsonl", Conversation, DataConfig(source=""))
