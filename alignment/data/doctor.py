"""What an unknown file is: its format, what each kind of stage can make of it, and what is wrong in which rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.config.data import SourceConfig
from alignment.data.fields import Fields, SetAside
from alignment.data.files import RawRow, rows_of
from alignment.data.formats.answers import TEXT
from alignment.data.formats.form import Format
from alignment.data.reading import prepared, right_form, start
from alignment.data.records import Conversation, PlainText, PreferencePair, Prompt, Record
from alignment.errors import DataError
from alignment.fingerprint import digest

USES: dict[str, tuple[str, type[Record]]] = {
    "cpt": ("texts", PlainText),
    "sft": ("conversations", Conversation),
    "reward, dpo": ("pairs", PreferencePair),
    "ppo": ("prompts", Prompt),
}
"""Stages, what they call their records, and those."""
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


@dataclass(kw_only=True)
class Use:
    """What one kind of record can be made of a file. ``faults`` are rows of which it cannot, ``set_aside`` those that
    it has no use for."""

    records: int = 0
    repeated: int = 0
    faults: list[DataError] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)


@dataclass(kw_only=True)
class Diagnosis:
    """``unreadable`` rows are no rows at all; ``columns`` counts in how many rows each stands, ``placeholders`` how
    many rows have each ``{{name}}`` in them."""

    path: Path
    format: Format
    rows: int = 0
    columns: Counter[str] = field(default_factory=Counter)
    placeholders: Counter[str] = field(default_factory=Counter)
    unreadable: list[DataError] = field(default_factory=list)
    uses: dict[str, Use] = field(default_factory=dict)

    @property
    def meant_for(self) -> list[str]:
        """The stages that at least half of the readable rows are of use to."""
        readable = self.rows - len(self.unreadable)
        return [name for name, use in self.uses.items() if use.records and len(use.faults) <= readable / 2]

    @property
    def faults(self) -> list[DataError]:
        """Unreadable rows, and those that every stage which the file is meant for finds faulty, each once."""
        found = {fault.where: fault for name in reversed(self.meant_for) for fault in self.uses[name].faults}
        return [*self.unreadable, *found.values()]


def examine(path: Path, data: SourceConfig) -> Diagnosis:
    """One pass over all rows.

    Raises:
        DataError: the file cannot be read at all, or its columns are of no known format.
    """
    told = Diagnosis(path=path, format=start(path, data).format)
    # Of every conversation a text can be made; only plain text has no better use.
    uses = {name: record for name, (_, record) in USES.items() if record is not PlainText or told.format is TEXT}
    told.uses = {name: Use() for name in uses}
    seen: dict[str, set[str]] = {name: set() for name in uses}
    examples = {name: right_form(told.format, record) for name, record in uses.items()}
    for row in rows_of(path):
        told.rows += 1
        if isinstance(row, DataError):
            told.unreadable.append(row)
            continue
        if isinstance(row.value, Mapping):
            told.columns.update(row.value.keys())
        value = prepared(row.value, data)
        told.placeholders.update(set(_PLACEHOLDER.findall(repr(value))))
        for name, record in uses.items():
            _try(told.uses[name], record, told.format, RawRow(where=row.where, value=value), examples[name], seen[name])
    return told


def _try(use: Use, record: type[Record], form: Format, row: RawRow, example: str, seen: set[str]) -> None:
    try:
        found: list[Any] = list(record.of(form.read(Fields(row.value, where=row.where, example=example))))
    except SetAside as reason:
        use.set_aside.append(reason)
    except DataError as fault:
        use.faults.append(fault)
    else:
        use.records += len(found)
        keys = {_key(one) for one in found}
        use.repeated += len(keys & seen)
        seen |= keys


def _key(record: Record) -> str:
    """The same for records that say the same."""
    said = [message.as_dict() for message in getattr(record, "messages", ())]
    return digest([*said, *(getattr(record, name, "") for name in ("text", "chosen", "rejected"))])
