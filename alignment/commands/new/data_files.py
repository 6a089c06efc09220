"""The user's data files as `align doctor` sees them, and how many records and different prompts each has."""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from alignment.commands.shared.diagnoses import best_use, examined, path_of
from alignment.commands.shared.stored_policy import written_error
from alignment.config.data import SourceConfig
from alignment.config.new_recipe import Lengths, Rows
from alignment.core.artifacts import write_json
from alignment.core.errors import ConfigError, DataError, StageError
from alignment.core.terminal import visible
from alignment.core.wording import counted
from alignment.data import records as record_types
from alignment.data.doctor import counted_records
from alignment.data.fields import SetAside
from alignment.data.formats import format_of
from alignment.data.formats.form import Format
from alignment.data.overlap import HeldOut, asked
from alignment.data.reading import Reader, prepared
from alignment.data.records import HeldOutPrompt, LabelledAnswer, Prompt, Record
from alignment.data.row_files import RawRow
from alignment.data.source_files import snapshot_name, source_rows
from alignment.pipeline.backends import processes


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """A file, and the ``record`` that it is most of all meant for. ``source`` is what a recipe writes. ``number`` are
    its records, ``prompts`` the keys of its different prompts. ``faulty`` is the share of its rows that stages leave
    out. ``columns`` maps a format's columns to the file's."""

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
        return self.record is not record_types.PlainText

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
        of_prompt, own = (
            Reader(format=self.format, record=record, data=self.data) for record in (HeldOutPrompt, self.record)
        )
        for row in source_rows(self.path, self.data):
            if isinstance(row, RawRow):
                prompts: list[Any] = []
                with suppress(DataError):
                    prompts = of_prompt.records(row) if self.has_prompts else []
                try:
                    number, faulty = len(own.records(row)), False
                except DataError as error:
                    number, faulty = 0, not isinstance(error, SetAside)
                yield CountedRow(value=row.value, prompt=prompts[0] if prompts else None, number=number, faulty=faulty)

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
    """What a file is, printed in a line or two. ``columns`` maps a format's columns to its own. Raises DataError."""

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
        source=snapshot_name(diagnosis.path) or (source if ":" in source else f"path:{source}"),
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


_LAST_LEARNED = (Prompt, record_types.PreferencePair, LabelledAnswer, record_types.Conversation)
"""Records whose prompts are held out: those of the last stage that learns."""
FEWEST, _SHARE, _MOST = 50, 0.1, 200
"""At least so many different prompts are needed to hold out a tenth of them, but at most so many (chosen, not
tuned)."""
_MOST_ALIKE = 0.2
"""The share of a file's rows that may be left out because they resemble a held-out prompt. If more do, they were made
from a template, and are learned (chosen, not tuned)."""


@dataclass(kw_only=True)
class NewFiles:
    """Files that are written beside the recipe ``out``; none of them exists yet, and a failure removes them all."""

    out: Path
    written: list[Path] = field(default_factory=list)

    @contextmanager
    def create(self, path: Path) -> Iterator[IO[str]]:
        """Opens a new file. Raises ConfigError if it exists already."""
        try:
            stream = path.open("x", encoding="utf-8")
        except FileExistsError:
            remedy = "move it, or choose another name"
            raise ConfigError(f"{path} exists already", where="--out", remedy=remedy) from None
        self.written.append(path)
        with stream:
            yield stream

    def beside(self, name: str) -> Path:
        """``mine-NAME`` beside ``mine.yaml``; another name if this call wrote such a file."""
        path = self.out.with_name(f"{self.out.stem}-{name}.jsonl")
        number = 2
        while path in self.written:
            path = self.out.with_name(f"{self.out.stem}-{name}-{number}.jsonl")
            number += 1
        return path

    def remove(self) -> None:
        """Removes what was written."""
        for path in self.written:
            path.unlink(missing_ok=True)


def held_out_keys(files: Sequence[DataFile]) -> frozenset[int]:
    """The prompts to hold out; none if there are too few."""
    file = _asked_file(files)
    if file is None or len(file.prompts) < FEWEST:
        return frozenset()
    return frozenset(heapq.nsmallest(min(_MOST, int(_SHARE * len(file.prompts))), file.prompts))


def split(files: Sequence[DataFile], keys: frozenset[int], new: NewFiles) -> tuple[DataFile, list[DataFile]]:
    """A file of the prompts ``keys``, and the files without them; one that has none of them stays what it is. Raises
    ConfigError: a file to write exists already."""
    source = _asked_file(files)
    assert source is not None, "the prompts come from a file"
    path = new.beside("heldout")
    left = set(keys)
    with new.create(path) as stream:
        for row in source.read():
            if row.key is not None and row.key in left:
                left.remove(row.key)
                stream.write(_line(_held_out_row(source, row)))
    first = json.loads(path.read_text(encoding="utf-8").partition("\n")[0])
    columns = {} if source.record is LabelledAnswer else source.columns  # of labelled answers only the turns are left
    form = format_of(prepared(first, SourceConfig(columns=dict(columns))))
    held_out = replace(
        source,
        name=path.name,
        source=f"path:{path}",
        path=path.absolute(),
        format=form or source.format,
        record=Prompt,
        faulty=0.0,
        columns=columns,
        number=len(keys),
        prompts=keys,
    )
    return held_out, without(files, held_out, new)


def without(files: Sequence[DataFile], held_out: DataFile, new: NewFiles) -> list[DataFile]:
    """The files without the rows that ask a held-out prompt, or one that resembles it. A file that is written has no
    faulty rows either."""
    texts = HeldOut(asked(row.prompt) for row in held_out.read() if row.prompt is not None)
    return [_without(file, held_out.prompts, texts, new) if file.has_prompts else file for file in files]


def _without(file: DataFile, keys: frozenset[int], texts: HeldOut, new: NewFiles) -> DataFile:
    alike = [row.key for row in file.read() if row.prompt is not None and any(texts.overlaps([asked(row.prompt)]))]
    num_alike = sum(key not in keys for key in alike)
    left_out = keys if num_alike > _MOST_ALIKE * file.number else keys.union(key for key in alike if key is not None)
    if not left_out & file.prompts:
        return file
    path = new.beside(f"{Path(file.name).name.partition('.')[0]}-train")
    number = 0
    with new.create(path) as stream:
        for row in file.read():
            if row.key not in left_out and not row.faulty:
                stream.write(_line(row.value))
                number += row.number
    prompts = frozenset(key for key in file.prompts if key not in left_out)
    return replace(
        file, name=path.name, source=f"path:{path}", path=path.absolute(), faulty=0.0, number=number, prompts=prompts
    )


def _asked_file(files: Sequence[DataFile]) -> DataFile | None:
    by_record = {file.record: file for file in reversed(files)}
    return next((by_record[record] for record in _LAST_LEARNED if record in by_record), None)


def _held_out_row(file: DataFile, row: CountedRow) -> Any:
    """The row as it is, with all columns that a metric may read; of a labelled answer the prompt alone, because the
    answer may be a bad one."""
    if file.record is not LabelledAnswer or row.prompt is None:
        return row.value
    tools = {"tools": list(row.prompt.tools)} if row.prompt.tools else {}
    return {"messages": [turn.as_dict() for turn in row.prompt.messages], **tools}


def _line(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def measured_lengths(files: Sequence[DataFile], folder: Path, template: str | None) -> list[Lengths]:
    """The lengths of each file's records, by the tokenizer and the chat template of the model in a folder. It raises as
    ``measured`` of the worker does; StageError: its process failed."""
    described = [
        {"path": str(file.path), "record": file.record.__name__, "columns": dict(file.columns)} for file in files
    ]
    with tempfile.TemporaryDirectory() as temporary:
        question, answer = Path(temporary) / "asked.json", Path(temporary) / "answer.json"
        write_json(question, {"folder": str(folder), "template": template, "files": described})
        code = processes.call([sys.executable, "-m", "alignment.commands.new.worker", str(question), str(answer)])
        if error := written_error(answer.with_name("error.json")):
            raise error
        if code or not answer.is_file():
            remedy = "its output is above; a chat template that runs forever is stopped"
            raise StageError(f"the process that counts tokens ended with {code}", where="new", remedy=remedy)
        return [Lengths(**lengths) for lengths in json.loads(answer.read_text(encoding="utf-8"))]
