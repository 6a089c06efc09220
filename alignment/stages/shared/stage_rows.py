"""A stage's rows, as records or as token ids; rows that are left out are listed in a file next to the result."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from alignment.config.data import DataConfig, SourceConfig
from alignment.core.hardware import count_cores
from alignment.core.wording import counted
from alignment.data.mix import Indices, mixed, subset
from alignment.data.reading import count_rows, iterate, refuse_faults, start
from alignment.data.records import Record
from alignment.data.tokens.chunks import CHUNK, note_of_error, notes_of
from alignment.data.tokens.row_kinds import Kind, Limits, RowTooLong, Tokenized, refuse_losses, tokenized
from alignment.data.tokens.thoughts import lost_words
from alignment.data.tokens.token_table import TokenTable, token_table
from alignment.records.stages import CUT, LOST, TOO_LONG
from alignment.records.stages import LEFT_OUT_FILE as LEFT_OUT
from alignment.training.context import StageContext

R = TypeVar("R", bound=Record)

WHERE = "where"
DRAWN_AS = {"learned": "data"}
"""A fraction of the pairs that another stage learned from is drawn just as that stage drew it."""


def rows_of(context: StageContext, record: type[R], data: DataConfig, *, field: str = "data") -> list[R]:
    """The records of a stage's ``field``, mixed-in ones included; ``LEFT_OUT`` lists those that are left out."""
    _remove_old_list(context, field)
    sources = [_read(context, record, *source) for source in _sources(context, data, field)]
    rows = [row for source in sources for row in source]
    return [rows[index] for index in _indices(context, data, field, [len(source) for source in sources])]


def token_rows(
    context: StageContext, kind: Kind, data: DataConfig, limits: Limits, tokenizer: Any, *, field: str = "data"
) -> tuple[Dataset, dict[str, float]]:
    """Like ``rows_of``, tokenised, with the kind's columns; and how many rows there are, were too long or were cut.

    The column ``where`` names the file and row that a row is from (``split_origins``).
    """
    _remove_old_list(context, field)
    tables = [
        token_table(
            path,
            part,
            kind,
            limits,
            tokenizer,
            cache=context.spec.artifact.parent / "cache",
            processes=count_cores(),
            setting=setting,
            progress=_tokenising(context, path, part),
        )
        for setting, part, path in _sources(context, data, field)
    ]
    for table in tables:
        _copy_ledger(context, table)
    indices = _indices(context, data, field, [len(table.rows) for table in tables])
    columns = [*kind.all_columns, WHERE]
    rows = concatenate_datasets([table.rows.select_columns(columns) for table in tables])
    rows = rows if isinstance(indices, range) else selected(rows, indices)
    return rows, _counts(
        rows=len(rows),
        dropped=sum(table.count(TOO_LONG) for table in tables),
        cut=sum(table.count(CUT) for table in tables),
    )


def _sources(context: StageContext, data: DataConfig, field: str) -> list[tuple[str, SourceConfig, Path]]:
    """The stage's own source and those that are mixed in, each with the name of its setting."""
    own = f"stages.{context.spec.stage}.{field}"
    sources = context.spec.sources(data, field)
    names = [own, *(f"{own}.mix[{number}]" for number in range(len(sources) - 1))]
    return [(name, part, path) for name, (part, path) in zip(names, sources, strict=True)]


def _tokenising(context: StageContext, path: Path, data: SourceConfig) -> Callable[[int], None]:
    """Reports how many rows have been read, of how many; they are only counted if a table is missing."""
    total = functools.cache(lambda: count_rows(path, data))
    return lambda rows: context.progress("tokenising", rows, total())


def split_origins(rows: Dataset) -> tuple[Dataset, Callable[[int], str]]:
    """The rows without the column ``where``, and a function that reads it for a row's number."""
    origins = rows.select_columns([WHERE])
    return rows.remove_columns([WHERE]), lambda row: str(origins[row][WHERE])


def fitting(
    context: StageContext, kind: Kind, records: Sequence[Any], data: DataConfig, limits: Limits, tokenizer: Any
) -> tuple[dict[int, Tokenized], dict[str, float]]:
    """The tokenised records within the limits, by their index in ``records``; and counts as in ``token_rows``."""
    every = [
        row
        for first in range(0, len(records), CHUNK)
        for row in tokenized(tokenizer, kind, records[first : first + CHUNK], limits)
    ]
    notes = [note for row in every for note in notes_of(row)]
    faults = [row.fault for row in every if row.fault is not None and not isinstance(row.fault, RowTooLong)]
    dropped, cut = (sum(note.kind == kind for note in notes) for kind in (TOO_LONG, CUT))
    where = f"stages.{context.spec.stage}"
    refuse_faults(faults, data, count=len(faults), rows=len(records), setting=f"{where}.data")
    longest = max((row.tokens for row in every), default=0)
    refuse_losses(limits, dropped=dropped, cut=cut, records=len(records), longest=longest, where=where)
    list_left_out(context, [note.as_row() for note in notes])
    left_out = [note.as_row() for note in notes if not note.kind.startswith(LOST)]
    _announce(context, counted(len(records), "record"), len(left_out), left_out)
    _note_losses(context, where, Counter(loss for row in every for loss in row.lost), len(records))
    fitting_rows = {index: row for index, row in enumerate(every) if row.fault is None}
    return fitting_rows, _counts(rows=len(fitting_rows), dropped=dropped, cut=cut)


def _counts(*, rows: int, dropped: int, cut: int) -> dict[str, float]:
    return {"rows": float(rows), "rows_too_long": float(dropped), "rows_cut": float(cut)}


def _remove_old_list(context: StageContext, field: str) -> None:
    """An interrupted attempt may have left its list behind."""
    if field == "data" and context.is_main:
        (context.content / LEFT_OUT).unlink(missing_ok=True)


def selected(rows: Dataset, indices: Indices) -> Dataset:
    """``rows.select``, which would make a Python integer of each index and hash them all twice.

    ``rows`` are not themselves selected from other rows.
    """
    content = hashlib.sha256(rows._fingerprint.encode())
    content.update(indices.data)
    return Dataset(
        rows.data,
        info=rows.info,
        split=rows.split,
        indices_table=pa.table({"indices": indices.astype(np.uint64)}),
        fingerprint=content.hexdigest()[:16],
    )


def _indices(context: StageContext, data: DataConfig, field: str, counts: Sequence[int]) -> range | Indices:
    """Indices of the rows that the stage takes, in order; they count through the sources one after another.

    A range stands for all rows of the only source.
    """
    own: range | Indices = range(counts[0])
    if data.fraction < 1.0:
        own = subset(counts[0], data.fraction, context.run_generator(f"{DRAWN_AS.get(field, field)}.fraction"))
    if not data.mix:
        return own
    parts = list(zip(data.mix, counts[1:], strict=True))
    indices = mixed(len(own), parts, context.generator(f"{field}.mix"), where=f"stages.{context.spec.stage}.{field}")
    if isinstance(own, range):
        return indices
    is_own = indices < len(own)
    indices[~is_own] += counts[0] - len(own)
    indices[is_own] = own[indices[is_own]]
    return indices


def _read(context: StageContext, record: type[R], setting: str, data: SourceConfig, path: Path) -> list[R]:
    left_out: list[dict[str, str]] = []
    reading = start(path, data, setting=setting)
    reading.on_left_out = lambda error: left_out.append(note_of_error(error).as_row())
    records = list(iterate(path, record, data, reading=reading))
    list_left_out(context, left_out)
    _announce(context, f"{counted(reading.rows, 'row')} of {path}", len(left_out), left_out)
    return records


def _copy_ledger(context: StageContext, table: TokenTable) -> None:
    with table.ledger.open(encoding="utf-8") as stream:
        _append(context, stream)
    first = [note for kind, notes in table.first.items() if not kind.startswith(LOST) for note in notes]
    _announce(context, f"{counted(table.read, 'row')} of {table.path}", table.affected, first)
    _note_losses(context, str(table.path), table.losses, table.records)


def _note_losses(context: StageContext, where: str, losses: Mapping[str, int], records: int) -> None:
    """Notes once for a source what the chat template leaves out, and of how many records."""
    context.notes.extend(f"{where}: {lost_words(loss, count, records)}" for loss, count in losses.items())


def list_left_out(context: StageContext, entries: Iterable[Mapping[str, str]]) -> None:
    """Appends rows with where they are and the reason to ``LEFT_OUT``; only the main process writes."""
    _append(context, (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


def _append(context: StageContext, lines: Iterable[str]) -> None:
    """Appends to ``LEFT_OUT``, which is not created if there are no lines."""
    lines = iter(lines)
    first = next(lines, None)
    if context.is_main and first is not None:
        with (context.content / LEFT_OUT).open("a", encoding="utf-8") as stream:
            stream.writelines(chain([first], lines))


def _announce(context: StageContext, rows: str, count: int, entries: Sequence[Mapping[str, str]]) -> None:
    """A note for the user on how many of ``rows`` were left out or cut, with the first of them as an example."""
    if not entries or not context.is_main:
        return
    example = f"{entries[0]['where']}: {entries[0]['reason']}"
    context.notes.append(
        f"{count:,} of {rows} {'was' if count == 1 else 'were'} left out or cut, for example {example} "
        f"(all are in {context.spec.artifact / LEFT_OUT})"
    )
