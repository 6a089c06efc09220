"""Rows of a hub's data set as they lie in its cache: splits, subsets, and every kind of file."""

from __future__ import annotations

import gzip
import json
from io import BytesIO
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from alignment.config.data import SourceConfig
from alignment.core.errors import DataError
from alignment.core.fingerprint import file_sha256
from alignment.data.hub_rows import content_of, hub_rows, snapshot_name, source_rows
from alignment.data.reading import read_records
from alignment.data.records import Conversation
from tests.hub import NAME, leave_data_set, use_cache

ROWS = [{"prompt": f"Add {number} to it.", "completion": f"It is {number} more."} for number in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
FIRST = LINES.splitlines(keepends=True)[0]
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


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder below which a hub's cache lies."""
    use_cache(monkeypatch, tmp_path)
    return tmp_path


def _parquet() -> bytes:
    sink = BytesIO()
    parquet.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


CSV = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS)
KINDS = {
    "train.jsonl": LINES,
    "train.json": json.dumps(ROWS),
    "train.csv": CSV,
    "train.parquet": _parquet(),
    "train.jsonl.gz": gzip.compress(LINES.encode()),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows_in_order_with_their_numbers(cache: Path, name: str) -> None:
    folder = leave_data_set(cache, {f"data/{name}": KINDS[name]})
    rows = list(hub_rows(folder, "train", None))
    assert [row.value for row in rows] == ROWS
    assert [row.where for row in rows] == [f"{NAME} train: row {number}" for number in range(1, 5)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_tools_have_the_parameters_that_they_were_written_with(cache: Path, suffix: str) -> None:
    """``datasets`` reads Parquet into Arrow, where each tool has the parameters of all; columns of JSON may stay."""
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"properties": {name: {"type": "string"}}}}}
        for name in ("place", "time")
    ]
    row = {"prompt": "Where?", "completion": "Here.", "tools": tools}
    sink = BytesIO()
    parquet.write_table(pa.Table.from_pylist([row]), sink)
    content = json.dumps(row) + "\n" if suffix == "jsonl" else sink.getvalue()
    folder = leave_data_set(cache, {f"data/train.{suffix}": content})
    (conversation,) = read_records(folder, Conversation, SourceConfig())
    assert list(conversation.tools) == tools


def test_columns_that_are_called_like_the_fields_of_a_call_keep_their_nulls(cache: Path) -> None:
    rows = [{"prompt": "?", "name": "a", "arguments": None}, {"prompt": "!", "name": None, "arguments": "x"}]
    folder = leave_data_set(cache, {"data/train.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    assert [row.value for row in hub_rows(folder, "train", None)] == rows


def test_several_files_are_one_split_in_the_order_of_their_names(cache: Path) -> None:
    folder = leave_data_set(cache, {"data/train-00001.jsonl": LINES, "data/train-00000.jsonl": FIRST})
    assert [row.value for row in hub_rows(folder, "train", None)] == [ROWS[0], *ROWS]


def test_the_command_that_checks_all_rows_names_the_data_set_and_its_split(cache: Path) -> None:
    faulty = json.dumps({"prompt": "Add 1 to it.", "completion": " "}) + "\n"
    folder = leave_data_set(cache, {"data/train.jsonl": LINES, "data/test.jsonl": faulty})
    with pytest.raises(DataError) as caught:
        read_records(folder, Conversation, SourceConfig(split="test"))
    assert f"`align doctor {NAME} split=test` checks all rows" in str(caught.value)


def test_the_description_says_which_files_make_which_split_of_which_subset(cache: Path) -> None:
    folder = leave_data_set(cache, DESCRIBED)
    counts = {
        (subset, split): len(list(hub_rows(folder, split, subset)))
        for subset, split in (("short", "train"), ("short", "test"), ("long", "train"))
    }
    assert counts == {("short", "train"): 4, ("short", "test"): 1, ("long", "train"): 8}
    assert next(hub_rows(folder, "test", "short")).where == f"{NAME} short test: row 1"


@pytest.mark.parametrize(
    ("split", "subset", "message"),
    [
        ("validation", "short", "has no split 'validation'; it has train, test\n  → choose one with data.split=NAME"),
        ("train[:1]", "short", "has no split 'train[:1]'; it has train, test"),
        ("train", "shirt", "has no subset 'shirt'; it has short, long\n  → choose one with data.subset=NAME"),
        ("train", None, "has several subsets: short, long\n  → choose one with data.subset=NAME"),
    ],
)
def test_a_split_or_subset_that_is_not_there_is_refused_with_those_that_are(
    cache: Path, split: str, subset: str | None, message: str
) -> None:
    folder = leave_data_set(cache, DESCRIBED)
    with pytest.raises(DataError) as caught:
        list(hub_rows(folder, split, subset))
    assert str(caught.value).startswith(f"{NAME}: {message}")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "files",
    [
        {"train.jsonl": LINES + "{\n"},
        {"train.parquet": b"PAR0"},
        {"name.py": "raise SystemExit"},
        {"README.md": "---\nconfigs: 3\n---\n", "train.jsonl": LINES},
        {"README.md": "---\nconfigs:\n- config_name: a\n  data_files: absent.jsonl\n---\n", "train.jsonl": LINES},
    ],
    ids=["cut off", "not Parquet", "a script", "no description", "absent"],
)
def test_files_that_cannot_be_read_are_an_error_that_says_which_are(cache: Path, files: dict[str, str | bytes]) -> None:
    folder = leave_data_set(cache, files)
    with pytest.raises(DataError) as caught:
        list(hub_rows(folder, "train", None))
    assert str(caught.value).startswith(NAME)
    assert ": cannot be read: " in str(caught.value)
    assert "only JSON, CSV and Parquet files are read, never scripts" in str(caught.value)


@pytest.mark.parametrize("path", ["{folder}/secret.jsonl", "../../../../secret.jsonl"])
def test_a_description_that_names_files_of_other_places_is_refused(cache: Path, path: str) -> None:
    (cache / "secret.jsonl").write_text(LINES)
    readme = f"---\nconfigs:\n- config_name: a\n  data_files: {path.format(folder=cache)}\n---\n"
    folder = leave_data_set(cache, {"README.md": readme, "train.jsonl": LINES})
    with pytest.raises(DataError, match="names a file outside the repository: "):
        list(hub_rows(folder, "train", None))


def test_a_request_to_stop_is_not_taken_for_a_fault_of_the_data(cache: Path) -> None:
    class Stop(Exception):
        pass

    rows = hub_rows(leave_data_set(cache, {"train.jsonl": LINES}), "train", None)
    next(rows)
    with pytest.raises(Stop):
        rows.throw(Stop())


def test_rows_may_be_left_unread(cache: Path) -> None:
    folder = leave_data_set(cache, {"train.parquet": _parquet()})
    assert len(list(islice(hub_rows(folder, "train", None), 2))) == 2


def test_a_snapshot_is_read_as_one_and_any_other_folder_by_its_files(cache: Path) -> None:
    folder = leave_data_set(cache, {"data/train.jsonl": LINES, "data/test.jsonl": FIRST})
    assert snapshot_name(folder) == content_of(folder) == NAME
    assert len(list(source_rows(folder, SourceConfig(split="test")))) == 1
    file = folder / "data" / "train.jsonl"
    assert snapshot_name(file) is snapshot_name(file.parent) is None
    assert content_of(file) == file_sha256(file)
    assert len(list(source_rows(file.parent, SourceConfig(split="test")))) == 5


def test_records_are_read_from_a_snapshot_as_from_a_file(cache: Path) -> None:
    folder = leave_data_set(cache, {"data/train.jsonl": LINES})
    conversations = read_records(folder, Conversation, SourceConfig())
    assert [conversation.messages[-1].content for conversation in conversations] == [row["completion"] for row in ROWS]
    assert conversations[2].where == f"{NAME} train: row 3"
