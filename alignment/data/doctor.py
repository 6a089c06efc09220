"""What an unknown file is: its format, what each kind of stage can make of it, and what is wrong in which rows."""

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
from alignment.data.near_duplicates import NearRepeats
from alignment.data.overlap import Placed
from alignment.data.reading import prepared, right_form, start
from alignment.data.records import Conversation, HeldOutPrompt, PlainText, PreferencePair, Prompt, Question, Record
from alignment.data.row_files import RawRow

NOUNS: dict[type[Record], str] = {
    PlainText: "texts",
    Conversation: "conversations",
    PreferencePair: "pairs",
    Prompt: "prompts",
    HeldOutPrompt: "held-out prompts",
    Question: "questions with choices",
}
_OF_ONE_FORMAT: dict[type[Record], Format] = {PlainText: TEXT, Question: CHOICES}
"""Records that could be made of other formats too, of every conversation a text, which have a better use."""
_FULLEST: tuple[type[Record], ...] = (PreferencePair, Conversation, Prompt, PlainText)
"""Records, those that take most of a row first."""
MEANT = 0.1
"""Share of rows from which a file is meant for a stage; all others are then faulty."""
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


@dataclass(kw_only=True)
class Use:
    """What one kind of record can be made of a file. ``faults`` are rows of which it cannot, ``set_aside`` those that
    it has no use for."""

    record: type[Record]
    records: int = 0
    repeated: int = 0
    faults: list[DataError] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)


@dataclass(kw_only=True)
class Diagnosis:
    """``unreadable`` rows are no rows at all; ``columns`` counts in how many rows each stands, ``placeholders`` how
    many rows have each ``{{name}}`` in them. ``near`` has rows that say nearly the same as an earlier one, without
    those that say exactly the same."""

    path: Path
    format: Format
    rows: int = 0
    columns: Counter[str] = field(default_factory=Counter)
    placeholders: Counter[str] = field(default_factory=Counter)
    unreadable: list[DataError] = field(default_factory=list)
    uses: dict[str, Use] = field(default_factory=dict)
    near: NearRepeats = field(default_factory=NearRepeats)

    @property
    def meant_for(self) -> list[str]:
        """The stages that a tenth of the readable rows or more are of use to; else the one that finds least fault."""
        few = MEANT * (self.rows - len(self.unreadable))
        meant = [name for name, use in self.uses.items() if use.records and use.records >= few]
        best = min(self.uses, key=lambda name: (-self.uses[name].records, len(self.uses[name].faults)))
        return meant or [best]

    @property
    def faults(self) -> list[DataError]:
        """Unreadable rows, and those that every stage which the file is meant for finds faulty, each once."""
        found = {fault.where: fault for name in reversed(self.meant_for) for fault in self.uses[name].faults}
        return [*self.unreadable, *found.values()]


def examine(path: Path, data: SourceConfig, records: Mapping[str, type[Record]]) -> Diagnosis:
    """One pass over all rows. ``records`` says what stages make of a row, by the names of those stages.

    Raises:
        DataError: the file cannot be read at all, or its columns are of no known format.
    """
    told = Diagnosis(path=path, format=start(path, data).format)
    uses = {name: record for name, record in records.items() if _OF_ONE_FORMAT.get(record, told.format) is told.format}
    told.uses = {name: Use(record=record) for name, record in uses.items()}
    seen: dict[str, set[str]] = {name: set() for name in uses}
    examples = {name: right_form(told.format, record) for name, record in uses.items()}
    for row in source_rows(path, data):
        told.rows += 1
        if isinstance(row, DataError):
            told.unreadable.append(row)
            continue
        if isinstance(row.value, Mapping):
            told.columns.update(row.value.keys())
        value = prepared(row.value, data)
        told.placeholders.update(set(_PLACEHOLDER.findall(repr(value))))
        given = RawRow(where=row.where, value=value)
        new = {
            name: _try(told.uses[name], record, told.format, given, examples[name], seen[name])
            for name, record in uses.items()
        }
        told.near.add(Placed(where=row.where, text=_text_of(new, uses)))
    return told


def _try(use: Use, record: type[Record], form: Format, row: RawRow, example: str, seen: set[str]) -> list[Record]:
    """Counts what the row is to one kind of stage; returns its records without those that an earlier row gave too."""
    try:
        found: list[Any] = list(record.of(form.read(Fields(row.value, where=row.where, example=example))))
    except SetAside as reason:
        use.set_aside.append(reason)
    except DataError as fault:
        use.faults.append(fault)
    else:
        use.records += len(found)
        keyed = {record_key(one): one for one in found}
        new = [one for key, one in keyed.items() if key not in seen]
        use.repeated += len(keyed) - len(new)
        seen.update(keyed)
        return new
    return []


def record_key(record: Record) -> str:
    """The same for records that say the same."""
    said = [message.as_dict() for message in getattr(record, "messages", ())]
    return digest([*said, *(getattr(record, name, "") for name in ("text", "chosen", "rejected"))])


def _text_of(new: Mapping[str, Sequence[Record]], uses: Mapping[str, type[Record]]) -> str:
    """All that the new records of a row say, as the stage has them that takes most of it; empty where none is new.

    System turns are left out: many rows share one, and would be alike by it alone.
    """
    by_record = {uses[name]: made for name, made in new.items() if made}
    records = next((by_record[record] for record in _FULLEST if record in by_record), ())
    parts: list[str] = []
    for record in records:
        parts += [message.content for message in getattr(record, "messages", ()) if message.role != "system"]
        parts += [getattr(record, name, "") for name in ("text", "chosen", "rejected")]
    return "\n".join(dict.fromkeys(parts))
