"""Examines an unknown file: its format, what each kind of stage can make of it, and which rows are faulty."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from alignment.config.data import SourceConfig
from alignment.config.faults import misspelt
from alignment.core.errors import DataError
from alignment.core.wording import counted
from alignment.data.fields import Fields, SetAside, is_text, not_finite
from alignment.data.formats import ANSWERED, COLUMNS, LABEL, format_of
from alignment.data.formats.form import Format
from alignment.data.formats.plain import CHOICES, PROMPT, TEXT
from alignment.data.near_duplicates import NearDuplicates, RepeatedRecords, RowRelations
from alignment.data.reading import LOOKED_AT, NAMED, Objections, bare, prepared, start
from alignment.data.records import (
    Conversation,
    HeldOutPrompt,
    LabelledAnswer,
    PlainText,
    PreferencePair,
    Prompt,
    Question,
    Record,
)
from alignment.data.row_files import NotUtf8, RawRow
from alignment.data.source_files import source_rows

_NOUNS: dict[type[Record], tuple[str, str]] = {
    PlainText: ("text", "texts"),
    Conversation: ("conversation", "conversations"),
    PreferencePair: ("pair", "pairs"),
    LabelledAnswer: ("labelled answer", "labelled answers"),
    Prompt: ("prompt", "prompts"),
    HeldOutPrompt: ("held-out prompt", "held-out prompts"),
    Question: ("question with choices", "questions with choices"),
}
_OF_ONE_FORMAT: dict[type[Record], Format] = {PlainText: TEXT, Question: CHOICES}
"""Records that are made of one format only, although others would do: every conversation could be a text. Prompts
beside a column ``text`` are texts too."""
MEANT = 0.1
"""Share of rows from which a file counts as meant for a stage; all other rows are then faulty."""
LISTED = 8
"""Rows that are named for each reason to set rows aside."""
NAMES = 1_000
"""Different columns, placeholders and reasons that are counted; there may be as many as rows."""
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


def counted_records(count: int, record: type[Record]) -> str:
    """``1 pair`` or ``2,000 pairs``."""
    return counted(count, *_NOUNS.get(record, (record.__name__, record.__name__)))


@dataclass(kw_only=True)
class Use:
    """The records of one kind that a file gives, and how many of them are equal to earlier ones."""

    record: type[Record]
    records: int = 0
    repeated: int = 0


@dataclass(kw_only=True)
class Diagnosis:
    """What ``examine`` learned about a file. ``unreadable`` rows could not be parsed; the list holds the first ones
    with their numbers. ``num_not_utf8`` of them are not UTF-8, and ``has_non_ascii`` says whether a readable row has
    characters beyond ASCII. ``faulty`` rows are so for some stages, and rows that are ``set_aside``, by reason, are of
    no use for some. ``columns`` counts the rows that have each column, ``not_finite`` those with NaN or infinity in it,
    ``flags`` those with true or false, ``placeholders`` the rows that contain each ``{{name}}``. ``repeats`` holds rows
    that repeat or contradict an earlier one, ``near_duplicates`` rows whose text is nearly the same as an earlier
    one's. ``mapped`` are the settings' ``columns``, from a format's names to the file's. ``first_row`` is the first
    readable row, unless the settings name the format."""

    path: Path
    format: Format
    rows: int = 0
    columns: Counter[str] = field(default_factory=Counter)
    placeholders: Counter[str] = field(default_factory=Counter)
    not_finite: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    num_unreadable: int = 0
    num_not_utf8: int = 0
    has_non_ascii: bool = False
    unreadable: list[tuple[int, DataError]] = field(default_factory=list)
    uses: dict[str, Use] = field(default_factory=dict)
    faulty: Objections = field(default_factory=lambda: Objections(NAMED))
    set_aside: dict[str, Objections] = field(default_factory=dict)
    repeats: RowRelations = field(default_factory=RowRelations)
    near_duplicates: NearDuplicates = field(default_factory=NearDuplicates)
    first_row: Mapping[str, Any] = field(default_factory=dict)
    mapped: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_useless(self) -> bool:
        """Whether no stage can make anything of any row."""
        return not any(use.records for use in self.uses.values())

    @property
    def meant_for(self) -> list[str]:
        """The stages that can use at least a tenth of the readable rows; else the stage with the fewest faults."""
        few = MEANT * (self.rows - self.num_unreadable)
        meant = [name for name, use in self.uses.items() if use.records and use.records >= few]
        best = min(self.uses, key=lambda name: (-self.uses[name].records, self.faulty.count([name])))
        return meant or [best]

    @property
    def num_faults(self) -> int:
        """Number of rows that are unreadable, or faulty for a stage that the file is meant for."""
        return self.num_unreadable + self.faulty.count(self.meant_for)

    @property
    def faults(self) -> list[DataError]:
        """The first ``NAMED`` rows that are unreadable or faulty, in the order of the file."""
        faults = [*self.unreadable, *self.faulty.numbered(self.meant_for)]
        return [error for _, error in sorted(faults, key=lambda fault: fault[0])][:NAMED]

    @property
    def misspelt_columns(self) -> dict[str, str]:
        """Columns that no format reads, and the column that each is probably meant to be."""
        read = {*COLUMNS, *self.mapped.values()}
        meant = {name: misspelt(name, COLUMNS) for name in self.columns if name not in read}
        present = {*self.columns, *self.mapped}
        return {name: known for name, known in meant.items() if known is not None and known not in present}

    @property
    def likely_labels(self) -> list[str]:
        """Columns that no format reads and that are true or false in every row, if the rows have an answer and no
        label."""
        if self.format.name not in ANSWERED or LABEL in {*self.columns, *self.mapped}:
            return []
        readable = self.rows - self.num_unreadable
        read = {*COLUMNS, *self.mapped.values()}
        return [name for name, count in self.flags.items() if count == readable and name not in read]

    @property
    def misspelt_format(self) -> Format | None:
        """The format that the rows would have if the columns that are misspelt in every row had their right names; None
        if it is the one that they have."""
        readable = self.rows - self.num_unreadable
        right = {name: known for name, known in self.misspelt_columns.items() if self.columns[name] == readable}
        row = {right.get(name, name): value for name, value in self.first_row.items()}
        form = format_of(row) if right else None
        if form is None or form is self.format:
            return None
        try:
            form.read(Fields(row, where="", example=form.row))
        except DataError:
            return None
        return form


def examine(
    path: Path,
    data: SourceConfig,
    records: Mapping[str, type[Record]],
    *,
    go_on: Callable[[Diagnosis], bool] = lambda _: True,
) -> Diagnosis:
    """One pass over all rows. ``records`` maps the names of stages to the records that they make of a row. ``go_on`` is
    asked after each row whether to read the next one. Memory grows only by a hash for each record of each stage. Raises
    DataError: the file cannot be read at all, or no known format has its columns."""
    diagnosis = Diagnosis(path=path, format=start(path, data).format, mapped=data.columns)
    diagnosis.uses = {
        name: Use(record=record)
        for name, record in records.items()
        if _OF_ONE_FORMAT.get(record, diagnosis.format) is diagnosis.format
        or (record is PlainText and diagnosis.format is PROMPT and _has_texts(path, data))
    }
    repeated = RepeatedRecords({name: use.record for name, use in diagnosis.uses.items()}, diagnosis.near_duplicates)
    diagnosis.repeats = repeated.related
    for row in source_rows(path, data):
        diagnosis.rows += 1
        if isinstance(row, RawRow):
            _look_at(row, data, diagnosis, repeated)
        else:
            diagnosis.num_unreadable += 1
            diagnosis.num_not_utf8 += isinstance(row, NotUtf8)
            diagnosis.unreadable += [(diagnosis.rows, row)] if len(diagnosis.unreadable) < NAMED else []
        if not go_on(diagnosis):
            break
    for name, use in diagnosis.uses.items():
        use.repeated = repeated.counts[name]
    return diagnosis


def _has_texts(path: Path, data: SourceConfig) -> bool:
    first = islice(source_rows(path, data), LOOKED_AT)
    rows = (prepared(row.value, data) for row in first if isinstance(row, RawRow))
    return any(isinstance(row, Mapping) and is_text(row.get("text")) for row in rows)


def _look_at(row: RawRow, data: SourceConfig, diagnosis: Diagnosis, repeated: RepeatedRecords) -> None:
    if isinstance(row.value, Mapping):
        _count(diagnosis.columns, row.value.keys())
        _count(diagnosis.flags, [name for name, value in row.value.items() if _is_flag(value)])
        _count(diagnosis.not_finite, [name for name, value in row.value.items() if not_finite(value)])
    value = prepared(row.value, data)
    if not diagnosis.first_row and data.format is None and isinstance(value, Mapping):
        diagnosis.first_row = value
    text = repr(value)
    diagnosis.has_non_ascii = diagnosis.has_non_ascii or not text.isascii()
    if "{{" in text:
        _count(diagnosis.placeholders, set(_PLACEHOLDER.findall(text)))
    records, errors = _read(RawRow(where=row.where, value=value), diagnosis.format, diagnosis.uses)
    faults = {name: error for name, error in errors.items() if not isinstance(error, SetAside)}
    if faults:
        diagnosis.faulty.add(diagnosis.rows, faults)
    for reason in dict.fromkeys(error.message for error in errors.values() if isinstance(error, SetAside)):
        of_stages = {name: error for name, error in errors.items() if error.message == reason and name not in faults}
        known = reason in diagnosis.set_aside or len(diagnosis.set_aside) < NAMES
        objections = diagnosis.set_aside.setdefault(reason if known else "other reasons", Objections(LISTED))
        objections.add(diagnosis.rows, of_stages)
    for name, of_stage in records.items():
        diagnosis.uses[name].records += len(of_stage)
    author = str(value.get(diagnosis.format.author, "")) if isinstance(value, Mapping) else ""
    repeated.add(row.where, records, author=author)


def _is_flag(value: Any) -> bool:
    """Whether ``value`` is true or false, which is text in a CSV."""
    return isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false"))


def _count(counts: Counter[str], names: Iterable[str]) -> None:
    counts.update(names if len(counts) < NAMES else [name for name in names if name in counts])


def _read(row: RawRow, form: Format, uses: Mapping[str, Use]) -> tuple[dict[str, list[Record]], dict[str, DataError]]:
    try:
        example = form.read(Fields(row.value, where=row.where, example=form.row))
    except DataError as error:
        return {}, dict.fromkeys(uses, bare(error))
    records: dict[str, list[Record]] = {}
    errors: dict[str, DataError] = {}
    for name, use in uses.items():
        try:
            of_row: list[Any] = list(use.record.of(example))
            records[name] = of_row
        except DataError as error:
            errors[name] = bare(error)
    return records, errors
