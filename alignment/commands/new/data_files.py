"""The user's data files as `align doctor` sees them, and how many records and different prompts each has."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from alignment.commands.shared.diagnoses import best_use, examined, path_of
from alignment.config.data import SourceConfig
from alignment.config.new_recipe import Rows
from alignment.core.errors import ConfigError, DataError
from alignment.core.terminal import visible
from alignment.core.text import counted
from alignment.data.doctor import Diagnosis, counted_records
from alignment.data.fields import SetAside
from alignment.data.formats.form import Format
from alignment.data.hub_rows import snapshot_name, source_rows
from alignment.data.overlap import asked
from alignment.data.reading import Reader
from alignment.data.records import HeldOutPrompt, PlainText, Prompt, Record
from alignment.data.row_files import RawRow


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """A file, and the ``record`` that it is most of all meant for.

    ``source`` is what a recipe writes. ``number`` are its records, ``prompts`` the keys of its different prompts.
    ``faulty`` is the share of its rows that stages leave out. ``columns`` maps a format's columns to the file's.
    """

    name: str
    source: str
    path: Path
    format: Format
    record: type[Record]
    faulty: float = 0.0
    number: int = 0
    prompts: frozenset[int] = frozenset()
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def data(self) -> SourceConfig:
        """How its rows are read."""
        return SourceConfig(columns=dict(self.columns))

    @property
    def has_prompts(self) -> bool:
        """Whether its rows ask something."""
        return self.record is not PlainText

    def counted(self) -> DataFile:
        """The same file, its records and prompts counted."""
        number, keys = 0, set[int]()
        for row in self.read():
            number += row.number
            if row.key is not None:
                keys.add(row.key)
        return replace(self, number=number, prompts=frozenset(keys))

    def read(self) -> Iterator[CountedRow]:
        """Each row that can be parsed."""
        of_prompt, own = (self._reader(record) for record in (HeldOutPrompt, self.record))
        for row in source_rows(self.path, self.data):
            if isinstance(row, RawRow):
                prompts = _records(of_prompt, row) if self.has_prompts else []
                try:
                    number, faulty = len(own.records(row)), False
                except DataError as error:
                    number, faulty = 0, not isinstance(error, SetAside)
                yield CountedRow(value=row.value, prompt=prompts[0] if prompts else None, number=number, faulty=faulty)

    def _reader(self, record: type[Record]) -> Reader:
        return Reader(format=self.format, record=record, data=self.data)

    @property
    def settings(self) -> dict[str, Any]:
        """What a stage's ``data`` is set to."""
        settings: dict[str, Any] = {"source": self.source}
        if self.columns:
            settings["columns"] = dict(self.columns)
        if self.faulty:
            settings["on_error"] = "skip"
        if self.faulty > SourceConfig().max_skipped:
            settings["max_skipped"] = math.ceil(100 * self.faulty) / 100
        return settings


@dataclass(frozen=True, kw_only=True, slots=True)
class CountedRow:
    """A row's ``value``, the ``prompt`` in it if there is one, and the ``number`` of records that a stage makes of
    it: none of a ``faulty`` one."""

    value: Any
    prompt: HeldOutPrompt | None
    number: int
    faulty: bool

    @property
    def key(self) -> int | None:
        """The same for rows that ask the same, whatever their case and spaces."""
        if self.prompt is None:
            return None
        text = " ".join(asked(self.prompt).text.lower().split())
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def look_at(console: Console, source: str, *, where: str, columns: Mapping[str, str] | None = None) -> DataFile:
    """What a file is, printed in a line or two. ``columns`` maps a format's columns to its own.

    Raises:
        DataError: it cannot be read, or no stage can use it.
        ConfigError: the user interrupted the reading.
    """

    def print_line(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    path = path_of(source, where=where, announce=print_line)
    diagnosis, is_whole = examined(console, path, SourceConfig(source=source, columns=dict(columns or {})))
    if not is_whole:
        raise KeyboardInterrupt
    use = best_use(diagnosis)
    if use is None or not diagnosis.uses[use[0]].records:
        raise DataError("no stage can use its rows", where=str(path), remedy=f"align doctor {source} says why")
    stages, record = use
    faults = diagnosis.num_unreadable + diagnosis.faulty.count([stages])
    file = DataFile(
        name=visible(Path(source.partition(":")[2] or source).name or source),
        source=_source(source, diagnosis),
        path=path,
        format=diagnosis.format,
        record=Prompt if record is HeldOutPrompt else record,
        faulty=faults / diagnosis.rows,
        columns=columns or {},
    )
    left_out = counted(faults, "faulty row is", "faulty rows are")
    more = f"; {left_out} left out (align doctor {source} lists {'it' if faults == 1 else 'them'})" if faults else ""
    records = counted_records(diagnosis.uses[stages].records, file.record)
    print_line(f"{file.name}: {records}, format {diagnosis.format.name}{more}")
    return file


def joined(files: Sequence[DataFile]) -> Rows:
    """The rows of several files of the same record: the first is a stage's own data, and all of the others is mixed
    in."""
    first, *others = files
    settings = first.settings
    if others:
        settings["mix"] = [file.settings for file in others]
    return Rows(
        files=[file.name for file in files],
        settings=settings,
        number=sum(file.number for file in files),
        prompts=len(frozenset().union(*(file.prompts for file in files))),
    )


def refuse_repeated(files: Sequence[str]) -> None:
    """Accepts files that are all different.

    Raises:
        ConfigError: a file is named twice.
    """
    for number, file in enumerate(files):
        if file in files[:number]:
            raise ConfigError(f"{file} is named twice", where="FILE", remedy="name each file once")


def _source(source: str, diagnosis: Diagnosis) -> str:
    if snapshot := snapshot_name(diagnosis.path):
        return snapshot
    return source if ":" in source else f"path:{source}"


def _records(reader: Reader, row: RawRow) -> list[Any]:
    try:
        return reader.records(row)
    except DataError:
        return []
