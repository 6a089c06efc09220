"""Holds prompts out of the user's data, so that policies are evaluated on what none of them has learned.

Rows that ask a held-out prompt, or one that resembles it, are left out of every file. What is left is copied, and the
user's files stay as they are. Prompts are chosen by a hash of their text, so they are the same ones in whatever order
the rows are.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from alignment.commands.new.data_files import CountedRow, DataFile
from alignment.config.data import SourceConfig
from alignment.core.errors import ConfigError
from alignment.data.formats import format_of
from alignment.data.overlap import HeldOut, asked
from alignment.data.reading import prepared
from alignment.data.records import Conversation, LabelledAnswer, PreferencePair, Prompt

_LAST_LEARNED = (Prompt, PreferencePair, LabelledAnswer, Conversation)
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
        """Opens a new file.

        Raises:
            ConfigError: it exists already.
        """
        try:
            stream = path.open("x", encoding="utf-8")
        except FileExistsError:
            raise ConfigError(
                f"{path} exists already", where="--out", remedy="move it, or choose another name"
            ) from None
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
    """A file of the prompts ``keys``, and the files without them; one that has none of them stays what it is.

    Raises:
        ConfigError: a file to write exists already.
    """
    source = _asked_file(files)
    assert source is not None, "the prompts come from a file"
    path = new.beside("heldout")
    left = set(keys)
    with new.create(path) as stream:
        for row in source.read():
            if row.key is not None and row.key in left:
                left.remove(row.key)
                _write(stream, _held_out_row(source, row))
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
    )
    held_out = replace(held_out, number=len(keys), prompts=keys)
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
                _write(stream, row.value)
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


def _write(stream: IO[str], row: Any) -> None:
    stream.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
