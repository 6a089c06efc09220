"""Examines an unknown file: its format, what each kind of stage can make of it, and which rows are faulty."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.config.data import SourceConfig
from alignment.core.errors import DataError
from alignment.core.fingerprint import digest
from alignment.data.fields import Fields, SetAside
from alignment.data.formats.form import Format
from alignment.data.formats.plain import CHOICES, TEXT
from alignment.data.hub_rows import source_rows
from alignment.data.near_duplicates import NearDuplicates
from alignment.data.overlap import LocatedText
from alignment.data.reading import prepared, right_form, start
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
from alignment.data.row_files import RawRow

NOUNS: dict[type[Record], str] = {
    PlainText: "texts",
    Conversation: "conversations",
    PreferencePair: "pairs",
    LabelledAnswer: "labelled answers",
    Prompt: "prompts",
    HeldOutPrompt: "held-out prompts",
    Question: "questions with choices",
}
_OF_ONE_FORMAT: dict[type[Record], Format] = {PlainText: TEXT, Question: CHOICES}
"""Records that are made of one format only, although others would do: every conversation could be a text."""
_FULLEST: tuple[type[Record], ...] = (PreferencePair, LabelledAnswer, Conversation, Prompt, PlainText)
"""Records, those that use most of a row first."""
_TEXTS = ("text", "chosen", "rejected", "answer")
"""Fields of records that hold a text beside their turns."""
MEANT = 0.1
"""Share of rows from which a file counts as meant for a stage; all other rows are then faulty."""
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


@dataclass(kw_only=True)
class Use:
    """The records of one kind that a file gives. ``faults`` are faulty rows, ``set_aside`` rows of no use for the
    kind."""

    record: type[Record]
    records: int = 0
    repeated: int = 0
    faults: list[DataError] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)


@dataclass(kw_only=True)
class Diagnosis:
    """What ``examine`` learned about a file.

    ``unreadable`` rows could not be parsed. ``columns`` counts the rows that have each column, ``placeholders`` the
    rows that contain each ``{{name}}``. ``near_duplicates`` holds rows whose text is nearly the same as an earlier
    one's; exact duplicates are not among them.
    """

    path: Path
    format: Format
    rows: int = 0
    columns: Counter[str] = field(default_factory=Counter)
    placeholders: Counter[str] = field(default_factory=Counter)
    unreadable: list[DataError] = field(default_factory=list)
    uses: dict[str, Use] = field(default_factory=dict)
    near_duplicates: NearDuplicates = field(default_factory=NearDuplicates)

    @property
    def meant_for(self) -> list[str]:
        """The stages that can use at least a tenth of the readable rows; else the stage with the fewest faults."""
        few = MEANT * (self.rows - len(self.unreadable))
        meant = [name for name, use in self.uses.items() if use.records and use.records >= few]
        best = min(self.uses, key=lambda name: (-self.uses[name].records, len(self.uses[name].faults)))
        return meant or [best]

    @property
    def faults(self) -> list[DataError]:
        """Unreadable rows, and rows that are faulty for a stage that the file is meant for, each once."""
        distinct = {fault.where: fault for name in reversed(self.meant_for) for fault in self.uses[name].faults}
        return [*self.unreadable, *distinct.values()]


def examine(path: Path, data: SourceConfig, records: Mapping[str, type[Record]]) -> Diagnosis:
    """One pass over all rows. ``records`` maps the names of stages to the records that they make of a row.

    Raises:
        DataError: the file cannot be read at all, or no known format has its columns.
    """
    diagnosis = Diagnosis(path=path, format=start(path, data).format)
    uses = {
        name: record
        for name, record in records.items()
        if _OF_ONE_FORMAT.get(record, diagnosis.format) is diagnosis.format
    }
    diagnosis.uses = {name: Use(record=record) for name, record in uses.items()}
    seen: dict[str, set[str]] = {name: set() for name in uses}
    examples = {name: right_form(diagnosis.format, record) for name, record in uses.items()}
    for row in source_rows(path, data):
        diagnosis.rows += 1
        if isinstance(row, DataError):
            diagnosis.unreadable.append(row)
            continue
        if isinstance(row.value, Mapping):
            diagnosis.columns.update(row.value.keys())
        value = prepared(row.value, data)
        diagnosis.placeholders.update(set(_PLACEHOLDER.findall(repr(value))))
        renamed = RawRow(where=row.where, value=value)
        new = {
            name: _try(diagnosis.uses[name], record, diagnosis.format, renamed, examples[name], seen[name])
            for name, record in uses.items()
        }
        diagnosis.near_duplicates.add(LocatedText(where=row.where, text=_text_of(new, uses)))
    return diagnosis


def _try(use: Use, record: type[Record], form: Format, row: RawRow, example: str, seen: set[str]) -> list[Record]:
    """Counts the row for one kind of stage; returns its records that no earlier row gave."""
    try:
        records: list[Any] = list(record.of(form.read(Fields(row.value, where=row.where, example=example))))
    except SetAside as reason:
        use.set_aside.append(reason)
    except DataError as fault:
        use.faults.append(fault)
    else:
        use.records += len(records)
        keyed = {record_key(record): record for record in records}
        new = [record for key, record in keyed.items() if key not in seen]
        use.repeated += len(keyed) - len(new)
        seen.update(keyed)
        return new
    return []


def record_key(record: Record) -> str:
    """A hash that is equal for records with equal content."""
    turns = [message.as_dict() for message in getattr(record, "messages", ())]
    texts = [getattr(record, name, "") for name in _TEXTS]
    label = str(getattr(record, "desirable", ""))
    return digest([*turns, *texts, label, *getattr(record, "later_turns", ())])


def _text_of(new: Mapping[str, Sequence[Record]], uses: Mapping[str, type[Record]]) -> str:
    """The text of a row's new records, read by the stage that uses most of the row; empty if no record is new.

    System turns are left out: many rows share one, which alone would make them near duplicates.
    """
    by_record = {uses[name]: made for name, made in new.items() if made}
    records = next((by_record[record] for record in _FULLEST if record in by_record), ())
    texts: list[str] = []
    for record in records:
        texts += [message.content for message in getattr(record, "messages", ()) if message.role != "system"]
        texts += [getattr(record, name, "") for name in _TEXTS]
        texts += getattr(record, "later_turns", ())
    return "\n".join(dict.fromkeys(texts))
