"""``align doctor``: an unknown data file explained, with the settings to write."""

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
from alignment.data.records import Conversation, HeldOutPrompt, PlainText, PreferencePair, Prompt, Record
from alignment.pipeline.plan import settings
from alignment.pipeline.sources import data_sources
from alignment.stages.registry import kinds

_PLACES = 8
"""Places that a reason spells out."""
_PAIRS = 5
"""Near repeats that are spelled out."""
_FIRST: tuple[type[Record], ...] = (PreferencePair, Conversation, HeldOutPrompt, Prompt, PlainText)
"""Records whose stages' settings are shown, the one that needs most of a row first."""


def show_diagnosis(console: Console, data: SourceConfig, *, against: str | None = None) -> int:
    """Prints what the file is, and which of its rows stand in ``against`` too; exit code 0, or 3 where rows are faulty.
    A hub's data set that is not on this machine is downloaded.

    Raises:
        ConfigError: the settings cannot be right.
        DataError: the file cannot be had, or not be read at all.
    """
    refuse(list(settings.source_faults(data, "DATA")))

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    path = _path_of(data.source, where="DATA", announce=say)
    other = None if against is None else _path_of(against, where="--against", announce=say)
    found = examine(path, data, records())
    for line in _lines(found, data):
        say(line)
    if against is not None and other is not None:
        for line in _overlaps(path, data, against, other):
            say(line)
    return DataError.exit_code if found.faults else 0


def records() -> dict[str, type[Record]]:
    """What stages make of a row, by the names of those that make the same of it."""
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
    assert path is not None, "what was fetched is here"
    return path


def _overlaps(path: Path, data: SourceConfig, against: str, other: Path) -> list[str]:
    held_out = HeldOut(asked_in(other, SourceConfig()))
    found = list(held_out.overlaps(asked_in(path, data)))
    lines = [_line("overlap", f"{len(found):,} rows ask what {against} asks" if found else f"none with {against}")]
    lines += [
        _line("", f"{_place(one.learned)} has {one.share:.0%} of {_place(one.held_out)}") for one in found[:NAMED]
    ]
    return lines + ([_line("", f"and {len(found) - NAMED:,} more")] if len(found) > NAMED else [])


def _lines(found: Diagnosis, data: SourceConfig) -> list[str]:
    columns = ", ".join(name if count == found.rows else f"{name} ({count:,})" for name, count in found.columns.items())
    lines = [
        f"{snapshot_name(found.path) or found.path}: {found.rows:,} rows",
        _line("format", f"{found.format.name}: {found.format.summary}"),
        _line("columns", columns),
    ]
    lines += [
        _line(stages, _of_use(NOUNS.get(use.record, use.record.__name__), use, found))
        for stages, use in found.uses.items()
    ]
    for reason, (stages, places) in _set_aside(found).items():
        lines.append(_line("set aside", f"{len(places):,} rows, in {', '.join(stages)}: {reason} ({_listed(places)})"))
    if found.placeholders:
        rows = ", ".join(f"{{{{{name}}}}} in {count:,} rows" for name, count in sorted(found.placeholders.items()))
        names = ", ".join(f"{name}: TEXT" for name in sorted(found.placeholders))
        lines.append(_line("unfilled", f"{rows}; data.placeholders={{{names}}} fills them"))
    lines += _near(found)
    lines.append(_line("faulty", f"{len(found.faults):,} rows" if found.faults else "no row"))
    lines += [_line("", f"{_place(fault.where)}: {fault.message}") for fault in found.faults[:NAMED]]
    if len(found.faults) > NAMED:
        lines.append(_line("", f"and {len(found.faults) - NAMED:,} more"))
    return [*lines, _line("to use it", _settings(found, data))]


def _line(name: str, text: str) -> str:
    return f"  {name:<12} {text}"


def _of_use(records: str, use: Use, found: Diagnosis) -> str:
    if not any(use is found.uses[name] for name in found.meant_for):
        return f"nothing: {use.faults[0].message}" if use.faults else "nothing"
    return f"{use.records:,} {records}" + (f", {use.repeated:,} of them repeated" if use.repeated else "")


def _set_aside(found: Diagnosis) -> dict[str, tuple[list[str], list[str]]]:
    """For each reason the stages that set rows aside for it, and which rows."""
    reasons: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for stages in found.meant_for:
        for error in found.uses[stages].set_aside:
            told, places = reasons.setdefault(error.message, ({}, {}))  # each once, in order
            told[stages] = None
            places[_place(error.where)] = None
    return {reason: (list(told), list(places)) for reason, (told, places) in reasons.items()}


def _near(found: Diagnosis) -> Iterator[str]:
    near = found.near.found
    told = f"{len(near):,} rows say nearly what an earlier row says; keep one of each, they count more than the others"
    yield _line("near repeats", told if near else "no row")
    for one in near[:_PAIRS]:
        yield _line("", f"{_place(one.where)} shares {one.share:.0%} of its runs of words with {_place(one.earlier)}")
    if len(near) > _PAIRS:
        yield _line("", f"and {len(near) - _PAIRS:,} more")
    if found.near.passed_over:
        yield _line("", f"only the first {found.near.looked_at:,} rows that differ were compared")


def _settings(found: Diagnosis, data: SourceConfig) -> str:
    meant_for = {found.uses[stages].record: stages for stages in found.meant_for}
    stages = next((meant_for[record] for record in _FIRST if record in meant_for), None)
    if stages is None:
        return "no stage can"
    stage = stages.rpartition(", ")[2]
    share = math.ceil(100 * len(found.faults) / found.rows) / 100
    skip = f" stages.{stage}.data.on_error=skip" if found.faults else ""
    skip += f" stages.{stage}.data.max_skipped={share:g}" if share > data.max_skipped else ""
    source = snapshot_name(found.path) or f"path:{found.path}"
    chosen = "" if data.split == SourceConfig().split else f" stages.{stage}.data.split={data.split}"
    chosen += f" stages.{stage}.data.subset={data.subset}" if data.subset else ""
    return f"stages.{stage}.data.source={source}{chosen}{skip}"


def _place(where: str) -> str:
    """``FILE:LINE`` or ``FILE: row N`` without the folder."""
    return Path(where).name


def _listed(places: Sequence[str]) -> str:
    more = f" and {len(places) - _PLACES:,} more" if len(places) > _PLACES else ""
    return ", ".join(places[:_PLACES]) + more
