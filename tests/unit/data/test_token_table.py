"""A source as token rows on disk: the same rows however they are made, made once, with a list of what was left out."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tokenizers import normalizers

from alignment.config.data import DataConfig, OnError, TooLongConfig
from alignment.core.deadline import KILLED_BY
from alignment.core.errors import DataError, ModelError, StageError
from alignment.data.reading import Reader, read_records, start
from alignment.data.records import Conversation
from alignment.data.row_files import unparsed_rows_of
from alignment.data.tokens import chunks, token_table
from alignment.data.tokens.chunks import Job
from alignment.data.tokens.row_kinds import CONVERSATIONS, PAIRS, PROMPTS, SCORED_PAIRS, TEXTS, Kind, Limits
from alignment.data.tokens.token_table import TokenTable
from alignment.data.tokens.tokenize import tokenize_conversation
from alignment.training.session import Preempted
from tests.tiny import tiny_tokenizer

ALL = DataConfig(source="")
WIDE = Limits(row=500)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 4)
    monkeypatch.setattr(chunks, "FEW", 2)


def _rows(folder: Path, rows: list[Any]) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _talks(count: int) -> list[dict[str, Any]]:
    completions = [{"completion": "At nine. " * (number % 3 + 1)} for number in range(count)]
    return [{"prompt": f"When does shop {number} open?"} | row for number, row in enumerate(completions)]


LONG = {"prompt": "Why? " * 200, "completion": "So."}


def _table(file: Path, tokenizer: Any, **changes: Any) -> TokenTable:
    settings: dict[str, Any] = {"data": ALL, "kind": CONVERSATIONS, "limits": WIDE, "processes": 1}
    settings["cache"] = file.parent / "cache"
    return token_table.token_table(file, tokenizer=tokenizer, **(settings | changes))


def _tables(folder: Path) -> list[Path]:
    return list((folder / "cache").glob("tokens-*"))


DAMAGES = {
    "rows of another kind": lambda folder: (folder / "rows.arrow").write_bytes(
        b"x" * (folder / "rows.arrow").stat().st_size
    ),
    "no list of what was left out": lambda folder: (folder / "left_out.jsonl").unlink(),
    "no counts, which are written last": lambda folder: (folder / "counts.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_made_anew(damage: str, tokenizer: Any, tmp_path: Path) -> None:
    file = _rows(tmp_path, _talks(3))
    rows = _table(file, tokenizer).rows.to_list()
    (folder,) = _tables(tmp_path)
    DAMAGES[damage](folder)
    again = _table(file, tokenizer)
    assert (again.rows.to_list(), again.read) == (rows, 3)


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_are_those_of_the_records_in_their_order(tmp_path: Path, tokenizer: Any, processes: int) -> None:
    file = _rows(tmp_path, _talks(50))
    table = _table(file, tokenizer, processes=processes)
    expected = [tokenize_conversation(tokenizer, record.messages) for record in read_records(file, Conversation, ALL)]
    assert table.rows["input_ids"][:] == [row.input_ids for row in expected]
    assert table.rows["labels"][:] == [row.labels for row in expected]
    assert table.rows["where"][:] == [f"{file}:{line}" for line in range(1, 51)]
    assert (table.read, table.records) == (50, 50)
    assert table.longest == max(len(row.input_ids) for row in expected)


@pytest.mark.parametrize("processes", [1, 2])
def test_margins_stand_beside_their_pairs_and_a_pair_without_scores_is_left_out(
    tmp_path: Path, tokenizer: Any, processes: int
) -> None:
    rows = [
        {"prompt": f"{number}?", "chosen": "Yes.", "rejected": "No.", "chosen_score": number / 2, "rejected_score": -1}
        for number in range(20)
    ]
    del rows[3]["chosen_score"]
    file = _rows(tmp_path, rows)
    skipping = DataConfig(source="", on_error=OnError.skip)
    table = _table(file, tokenizer, kind=SCORED_PAIRS, data=skipping, processes=processes)
    pairs = _table(file, tokenizer, kind=PAIRS, processes=processes)
    others = [number for number in range(20) if number != 3]
    assert table.rows["margin"][:] == [number / 2 + 1 for number in others]
    assert table.rows["chosen"][:] == [pairs.rows["chosen"][number] for number in others]
    assert table.rows["where"][:] == [f"{file}:{number + 1}" for number in others]
    assert "margin" not in pairs.rows.column_names
    with pytest.raises(DataError, match=f"{file}:4: the row has no numbers in 'chosen_score' and 'rejected_score'"):
        _table(file, tokenizer, kind=SCORED_PAIRS, processes=processes)


def test_a_table_is_made_once(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _rows(tmp_path, _talks(9))
    first = _table(file, tokenizer)
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, first.rows.features.arrow_schema.remove_metadata()) as writer:
        for batch in pa.ipc.open_stream(_files_of(tmp_path)["rows.arrow"]):
            writer.write_batch(batch)
    assert _files_of(tmp_path)["rows.arrow"] == stream.getvalue(), "as Arrow writes it"
    with monkeypatch.context() as patch:
        patch.setattr(token_table, "run", lambda *_, **__: pytest.fail("made again"))
        again = _table(file, tiny_tokenizer())
    assert again.rows.to_list() == first.rows.to_list()
    assert (again.read, again.records, again.longest) == (first.read, first.records, first.longest)
    assert len(_table(_rows(tmp_path, _talks(10)), tokenizer).rows) == 10, "another file is another table"


def _other_template() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("You are tiny.", "You are small.")
    return tokenizer


def _other_pipeline() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    "changes",
    [
        {"limits": Limits(row=499)},
        {"data": DataConfig(source="", limit=8)},
        {"data": DataConfig(source="", columns={"prompt": "completion"})},
        {"kind": PROMPTS},
        {"tokenizer": _other_template()},
        {"tokenizer": _other_pipeline()},
    ],
    ids=["row", "limit", "columns", "kind", "template", "normaliser"],
)
def test_what_changes_rows_changes_the_table(tmp_path: Path, tokenizer: Any, changes: dict[str, Any]) -> None:
    file = _rows(tmp_path, _talks(9))
    before: dict[str, Any] = {"tokenizer": tokenizer, "kind": PROMPTS if "data" in changes else CONVERSATIONS}
    for settings in (before, before | changes):
        _table(file, **settings)
    assert len(_tables(tmp_path)) == 2


def test_how_faults_and_losses_are_taken_needs_no_new_table(tmp_path: Path, tokenizer: Any) -> None:
    file = _rows(tmp_path, [*_talks(30), {"prompt": "Hi.", "completion": ""}])
    for _ in range(2):
        with pytest.raises(DataError, match="'completion' must be text and not empty") as caught:
            _table(file, tokenizer)
        assert caught.value.where == f"{file}:31"
        assert caught.value.remedy is not None
    assert len(_table(file, tokenizer, data=DataConfig(source="", on_error=OnError.skip)).rows) == 30
    assert len(_tables(tmp_path)) == 1
    file = _rows(tmp_path, [*_talks(4), LONG])
    with pytest.raises(DataError, match=r"(?s)1 dropped of 5 rows .* raise too_long\.max_share"):
        _table(file, tokenizer, limits=Limits(row=100))
    assert len(_table(file, tokenizer, limits=Limits(row=100, too_long=TooLongConfig(max_share=0.5))).rows) == 4
    assert len(_tables(tmp_path)) == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_the_ledger_says_what_became_of_every_row(tmp_path: Path, tokenizer: Any, processes: int) -> None:
    rows: list[Any] = [row | {"label": True} for row in _talks(60)]
    rows[7] |= {"label": False}
    rows[11] |= {"completion": 5}
    rows[20] |= LONG
    file = _rows(tmp_path, rows)
    data = DataConfig(source="", on_error=OnError.skip)
    table = _table(file, tokenizer, data=data, limits=Limits(row=200), processes=processes)
    notes = [json.loads(line) for line in table.ledger.read_text().splitlines()]
    assert sorted((int(note["where"].rsplit(":")[-1]), note["kind"], note["reason"]) for note in notes) == [
        (8, "set aside", "'label' says that the answer is bad"),
        (12, "fault", "'completion' must be text and not empty; it is 5"),
        (21, "too long", f"the row has {table.longest} tokens of 200"),
    ]
    assert (table.read, len(table.rows)) == (60, 57)


def test_a_pair_has_three_columns_and_a_text_several_rows(tmp_path: Path, tokenizer: Any) -> None:
    pairs = _rows(tmp_path, [{"prompt": "Hi.", "chosen": "Hello.", "rejected": "Go."}])
    (pair,) = _table(pairs, tokenizer, kind=PAIRS).rows.select_columns(["prompt", "chosen", "rejected"])
    assert tokenizer.decode(pair["chosen"]) == "Hello.<|im_end|>"
    texts = _rows(tmp_path, [{"text": "The shop is closed on Monday."}])
    rows = _table(texts, tokenizer, kind=TEXTS, limits=Limits(row=5)).rows
    assert [len(row["input_ids"]) for row in rows][:-1] == [5] * (len(rows) - 1)
    whole = [token for row in rows for token in row["input_ids"]]
    assert tokenizer.decode(whole) == "The shop is closed on Monday.<|im_end|>"


def _files_of(folder: Path) -> dict[str, bytes]:
    (table,) = (folder / "cache").glob("tokens-*")
    return {path.name: path.read_bytes() for path in sorted(table.iterdir())}


@pytest.mark.parametrize("error", [KeyboardInterrupt, Preempted])
@pytest.mark.parametrize(("limit", "read_again"), [(None, range(9, 16)), (11, range(9, 13)), (7, range(0))])
def test_an_interrupted_table_goes_on_where_it_was_saved(
    tmp_path: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    limit: int | None,
    read_again: range,
) -> None:
    rows = [row | {"label": number != 2} for number, row in enumerate(_talks(15))]
    data = DataConfig(source="", limit=limit)
    file = _rows(tmp_path, rows)
    straight = _table(file, tokenizer, data=data).rows.to_list()
    whole = _files_of(tmp_path)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(token_table, "EVERY_SECONDS", 0.0)
    read: list[str] = []

    def breaks_off(job: Job, rows: Any, **options: Any) -> Any:
        for number, chunk in enumerate(chunks.run(job, rows, **options)):
            if number == 2:
                monkeypatch.setattr(token_table, "EVERY_SECONDS", 60.0)  # what follows is not saved
            yield chunk
            if number == 2:
                raise error
        raise error

    def counted(job: Job, rows: Any, **options: Any) -> Any:
        yield from chunks.run(job, (read.append(row.where) or row for row in rows), **options)

    with monkeypatch.context() as patch:
        patch.setattr(token_table, "run", breaks_off)
        with pytest.raises(error):
            _table(file, tokenizer, data=data)
        assert "counts.json" not in _files_of(tmp_path)
        patch.setattr(token_table, "run", counted)
        assert _table(file, tokenizer, data=data).rows.to_list() == straight
    assert _files_of(tmp_path) == whole
    assert read == [f"{file}:{line}" for line in read_again]


def _dies(*_: Any) -> Any:
    os._exit(1)


def _computes_without_end(*_: Any) -> Any:
    os.kill(os.getpid(), KILLED_BY)  # as its timer does


@pytest.mark.parametrize(
    ("sequences", "error", "words"),
    [
        (_dies, StageError, "a process that tokenised rows died"),
        (
            _computes_without_end,
            ModelError,
            r"(?s)the chat template ran for more than 30 s .*model\.chat_template=chatml",
        ),
    ],
)
def test_a_process_that_dies_stops_the_stage(
    tmp_path: Path, tokenizer: Any, sequences: Any, error: type[Exception], words: str
) -> None:
    """One that a template keeps too long is not taken for one without memory."""
    file = _rows(tmp_path, _talks(40))
    kind: Kind = dataclasses.replace(CONVERSATIONS, sequences=sequences)
    reader = Reader(format=start(file, ALL).format, record=Conversation, data=ALL)
    job = Job(tokenizer=tokenizer, kind=kind, reader=reader, limits=WIDE)
    with pytest.raises(error, match=words):
        list(chunks.run(job, unparsed_rows_of(file), limit=None, processes=2))


def test_a_limit_takes_the_first_records_and_reads_no_further(tmp_path: Path, tokenizer: Any) -> None:
    file = _rows(tmp_path, [*_talks(6), {"prompt": "Hi.", "completion": ""}])
    table = _table(file, tokenizer, data=DataConfig(source="", limit=6), processes=2)
    assert (len(table.rows), table.records, table.read) == (6, 6, 6)
