"""Reads a data file as `align doctor` does: which records stages can make of it, with progress on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from alignment.commands.shared.row_progress import RowProgress, stop_after_row
from alignment.config.data import SourceConfig
from alignment.core.terminal import Terminal
from alignment.data.doctor import Diagnosis, examine
from alignment.data.records import (
    Conversation,
    HeldOutPrompt,
    LabelledAnswer,
    PlainText,
    PreferencePair,
    Prompt,
    Record,
)
from alignment.data.row_count import count_rows
from alignment.data.source_files import locate
from alignment.pipeline.sources import data_sources
from alignment.stages.registry import kinds

_FIRST: tuple[type[Record], ...] = (
    PreferencePair,
    LabelledAnswer,
    Conversation,
    HeldOutPrompt,
    Prompt,
    PlainText,
)
"""Records by how much of a row they need, the one that needs most first."""


def records() -> dict[str, type[Record]]:
    """The record types that stages make of a row, by the names of the stages that share a type."""
    names: dict[type[Record], list[str]] = {}
    for kind in kinds().values():
        for slot in kind.data(kind.config()):
            if slot.record not in names or (kind.trains and slot.field == "data"):
                names.setdefault(slot.record, []).append(kind.name)
    return {", ".join(stages): record for record, stages in names.items()}


def best_use(diagnosis: Diagnosis) -> tuple[str, type[Record]] | None:
    """The record that a file is most of all meant for, after the names of its stages; None if no stage can use it."""
    meant_for = {diagnosis.uses[stages].record: stages for stages in diagnosis.meant_for}
    return next(((meant_for[record], record) for record in _FIRST if record in meant_for), None)


def path_of(source: str, *, where: str, announce: Callable[[str], None]) -> Path:
    """The file or folder of a source; a hub's data set that is not on this machine is downloaded.

    Raises:
        DataError: there is no such file, or it cannot be fetched.
    """
    if not source.startswith("hub:"):
        return locate(source if ":" in source else f"path:{source}", where=where)
    path = data_sources.fetch(data_sources.resolve(source, where=where), announce=announce).path
    assert path is not None, "fetched data has a path"
    return path


def progress_of(console: Console, path: Path, data: SourceConfig) -> RowProgress:
    """Progress through the rows of a source."""
    return RowProgress(console if console.is_terminal else Terminal(stderr=True), lambda: count_rows(path, data))


def examined(console: Console, path: Path, data: SourceConfig) -> tuple[Diagnosis, bool]:
    """What the rows are, and whether all have been read; Ctrl-C ends the reading after a row.

    Raises:
        DataError: the file cannot be read at all, or no known format has its columns.
    """
    progress = progress_of(console, path, data)
    try:
        with stop_after_row() as stop:

            def on_row(diagnosis: Diagnosis) -> bool:
                progress(diagnosis.rows)
                return not stop

            diagnosis = examine(path, data, records(), go_on=on_row)
            return diagnosis, not stop
    finally:
        progress.end()
