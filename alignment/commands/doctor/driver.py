"""``align doctor``: explains an unknown data file, with the settings to write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from alignment.config.data import SourceConfig
from alignment.config.faults import refuse
from alignment.core.errors import DataError
from alignment.data.bundled_files import locate
from alignment.data.doctor import NOUNS, Diagnosis, Use, examine
from alignment.data.hub_rows import snapshot_name
from alignment.data.overlap import HeldOut, asked_in
from alignment.data.reading import NAMED
from alignment.data.records import (
    Conversation,
    HeldOutPrompt,
    LabelledAnswer,
    PlainText,
    PreferencePair,
    Prompt,
    Record,
)
from alignment.pipeline.plan import settings
from alignment.pipeline.sources import data_sources
from alignment.stages.registry import kinds

_LISTED = 8
"""Locations that a reason lists."""
_PAIRS = 5
"""Near duplicates that are listed."""
_FIRST: tuple[type[Record], ...] = (
    PreferencePair,
    LabelledAnswer,
    Conversation,
    HeldOutPrompt,
    Prompt,
    PlainText,
)
"""Records for whose stages settings are printed, the one that needs most of a row first."""


def show_diagnosis(console: Console, data: SourceConfig, *, against: str | None = None) -> int:
    """Prints what the file is, and which of its rows are also in ``against``; returns 0, or 3 if rows are faulty.

    A hub's data set that is not on this machine is downloaded.

    Raises:
        ConfigError: the settings are invalid.
        DataError: the file cannot be fetched or read at all.
    """
    refuse(list(settings.source_faults(data, "DATA")))

    def print_line(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    path = _path_of(data.source, where="DATA", announce=print_line)
    other = None if against is None else _path_of(against, where="--against", announce=print_line)
    diagnosis = examine(path, data, records())
    for line in _lines(diagnosis, data):
        print_line(line)
    if against is not None and other is not None:
        for line in _overlaps(path, data, against, other):
            print_line(line)
    return DataError.exit_code if diagnosis.faults else 0


def records() -> dict[str, type[Record]]:
    """The record types that stages make of a row, by the names of the stages that share a type."""
    names: dict[type[Record], list[str]] = {}
    for kind in kinds().values():
        for slot in kind.data(kind.config()):
            if slot.record not in names or (kind.trains and slot.field == "data"):
                names.setdefault(slot.record, []).append(kind.name)
    return {", ".join(stages): record for record, stages in names.items()}


def _path_of(source: str, *, where: str, announce: Callable[[str], None]) -> Path:
    if not source.startswith("hub:"):
        return locate(source if ":" in source else f"path:{source}", where=where)
    path = data_sources.fetch(data_sources.resolve(source, where=where), announce=announce).path
    assert path is not None, "fetched data has a path"
    return path


def _overlaps(path: Path, data: SourceConfig, against: str, other: Path) -> list[str]:
    held_out = HeldOut(asked_in(other, SourceConfig()))
    overlaps = list(held_out.overlaps(asked_in(path, data)))
    lines = [
        _line("overlap", f"{len(overlaps):,} rows ask the same as {against}" if overlaps else f"none with {against}")
    ]
    lines += [
        _line("", f"{_short_location(row.learned)} has {row.share:.0%} of {_short_location(row.held_out)}")
        for row in overlaps[:NAMED]
    ]
    return lines + ([_line("", f"and {len(overlaps) - NAMED:,} more")] if len(overlaps) > NAMED else [])


def _lines(diagnosis: Diagnosis, data: SourceConfig) -> list[str]:
    columns = ", ".join(
        name if count == diagnosis.rows else f"{name} ({count:,})" for name, count in diagnosis.columns.items()
    )
    lines = [
        f"{snapshot_name(diagnosis.path) or diagnosis.path}: {diagnosis.rows:,} rows",
        _line("format", f"{diagnosis.format.name}: {diagnosis.format.summary}"),
        _line("columns", columns),
    ]
    lines += [
        _line(stages, _of_use(NOUNS.get(use.record, use.record.__name__), use, diagnosis))
        for stages, use in diagnosis.uses.items()
    ]
    for reason, (stages, locations) in _set_aside(diagnosis).items():
        lines.append(
            _line("set aside", f"{len(locations):,} rows, in {', '.join(stages)}: {reason} ({_listed(locations)})")
        )
    if diagnosis.placeholders:
        rows = ", ".join(f"{{{{{name}}}}} in {count:,} rows" for name, count in sorted(diagnosis.placeholders.items()))
        names = ", ".join(f"{name}: TEXT" for name in sorted(diagnosis.placeholders))
        lines.append(_line("unfilled", f"{rows}; fill them with data.placeholders={{{names}}}"))
    lines += _near_duplicates(diagnosis)
    lines.append(_line("faulty", f"{len(diagnosis.faults):,} rows" if diagnosis.faults else "no row"))
    lines += [_line("", f"{_short_location(fault.where)}: {fault.message}") for fault in diagnosis.faults[:NAMED]]
    if len(diagnosis.faults) > NAMED:
        lines.append(_line("", f"and {len(diagnosis.faults) - NAMED:,} more"))
    return [*lines, _line("to use it", _settings(diagnosis, data))]


def _line(name: str, text: str) -> str:
    return f"  {name:<12} {text}"


def _of_use(records: str, use: Use, diagnosis: Diagnosis) -> str:
    if not any(use is diagnosis.uses[name] for name in diagnosis.meant_for):
        return f"nothing: {use.faults[0].message}" if use.faults else "nothing"
    return f"{use.records:,} {records}" + (f", {use.repeated:,} of them repeated" if use.repeated else "")


def _set_aside(diagnosis: Diagnosis) -> dict[str, tuple[list[str], list[str]]]:
    """For each reason, the stages that set rows aside, and the locations of the rows."""
    reasons: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for stages in diagnosis.meant_for:
        for error in diagnosis.uses[stages].set_aside:
            names, locations = reasons.setdefault(error.message, ({}, {}))  # each once, in order
            names[stages] = None
            locations[_short_location(error.where)] = None
    return {reason: (list(names), list(locations)) for reason, (names, locations) in reasons.items()}


def _near_duplicates(diagnosis: Diagnosis) -> Iterator[str]:
    duplicates = diagnosis.near_duplicates.pairs
    summary = f"{len(duplicates):,} rows are nearly the same as an earlier row; keep one of each, or they count more"
    yield _line("duplicates", summary if duplicates else "no row")
    for duplicate in duplicates[:_PAIRS]:
        row, earlier = _short_location(duplicate.where), _short_location(duplicate.earlier)
        yield _line("", f"{row} shares {duplicate.share:.0%} of its runs of words with {earlier}")
    if len(duplicates) > _PAIRS:
        yield _line("", f"and {len(duplicates) - _PAIRS:,} more")
    if diagnosis.near_duplicates.passed_over:
        yield _line("", f"only the first {diagnosis.near_duplicates.looked_at:,} distinct rows were compared")


def _settings(diagnosis: Diagnosis, data: SourceConfig) -> str:
    meant_for = {diagnosis.uses[stages].record: stages for stages in diagnosis.meant_for}
    stages = next((meant_for[record] for record in _FIRST if record in meant_for), None)
    if stages is None:
        return "no stage can use it"
    stage = stages.rpartition(", ")[2]
    share = math.ceil(100 * len(diagnosis.faults) / diagnosis.rows) / 100
    skip = f" stages.{stage}.data.on_error=skip" if diagnosis.faults else ""
    skip += f" stages.{stage}.data.max_skipped={share:g}" if share > data.max_skipped else ""
    source = snapshot_name(diagnosis.path) or f"path:{diagnosis.path}"
    chosen = "" if data.split == SourceConfig().split else f" stages.{stage}.data.split={data.split}"
    chosen += f" stages.{stage}.data.subset={data.subset}" if data.subset else ""
    return f"stages.{stage}.data.source={source}{chosen}{skip}"


def _short_location(where: str) -> str:
    """``FILE:LINE`` or ``FILE: row N`` without the folder."""
    return Path(where).name


def _listed(locations: Sequence[str]) -> str:
    more = f" and {len(locations) - _LISTED:,} more" if len(locations) > _LISTED else ""
    return ", ".join(locations[:_LISTED]) + more
