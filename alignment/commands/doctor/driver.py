"""``align doctor``: explains an unknown data file, with the settings to write."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from rich.console import Console

from alignment.commands.shared.diagnoses import best_use, examined, path_of, progress_of
from alignment.commands.shared.row_progress import RowProgress
from alignment.config.data import SourceConfig
from alignment.config.faults import refuse
from alignment.core.errors import DataError
from alignment.data.doctor import LISTED, NOUNS, Diagnosis, Use
from alignment.data.hub_rows import snapshot_name
from alignment.data.overlap import HeldOut, asked_in
from alignment.data.reading import NAMED
from alignment.pipeline.execute.signals import INTERRUPTED
from alignment.pipeline.plan import settings

_PAIRS = 5
"""Near duplicates that are listed."""


def show_diagnosis(console: Console, data: SourceConfig, *, against: str | None = None) -> int:
    """Prints what the file is, and which of its rows are also in ``against``; returns 0, or 3 if rows are faulty.

    A hub's data set that is not on this machine is downloaded. After Ctrl-C it prints what it knows of the rows so far,
    and returns 130.

    Raises:
        ConfigError: the settings are invalid.
        DataError: the file cannot be fetched or read at all.
    """
    refuse(list(settings.source_faults(data, "DATA")))

    def print_line(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    path = path_of(data.source, where="DATA", announce=print_line)
    other = None if against is None else path_of(against, where="--against", announce=print_line)
    diagnosis, is_whole = examined(console, path, data)
    if not is_whole:
        print_line(f"interrupted; of the first {diagnosis.rows:,} rows:")
    for line in _lines(diagnosis, data):
        print_line(line)
    if not is_whole:
        return INTERRUPTED
    if against is not None and other is not None:
        for line in _overlaps(path, data, against, other, progress_of(console, path, data)):
            print_line(line)
    return DataError.exit_code if diagnosis.num_faults else 0


def _overlaps(path: Path, data: SourceConfig, against: str, other: Path, progress: RowProgress) -> list[str]:
    held_out = HeldOut(asked_in(other, SourceConfig()))
    overlaps = held_out.overlaps(progress.watched(asked_in(path, data)))
    first = list(islice(overlaps, NAMED))
    more = sum(1 for _ in overlaps)
    count = len(first) + more
    lines = [
        _line(
            "overlap",
            f"{count:,} rows resemble prompts of {against}"
            if count > 1
            else f"{'1' if count else 'no'} row resembles a prompt of {against}",
        )
    ]
    lines += [
        _line("", f"{_short_location(row.learned)} has {row.share:.0%} of {_short_location(row.held_out)}")
        for row in first
    ]
    return lines + ([_line("", f"and {more:,} more")] if more else [])


def _lines(diagnosis: Diagnosis, data: SourceConfig) -> list[str]:
    columns = ", ".join(
        name if count == diagnosis.rows else f"{name} ({count:,})" for name, count in diagnosis.columns.items()
    )
    lines = [
        f"{snapshot_name(diagnosis.path) or diagnosis.path}: {diagnosis.rows:,} rows",
        _line("format", f"{diagnosis.format.name}: {diagnosis.format.summary}"),
        _line("columns", columns),
    ]
    lines += [_line(stages, _of_use(stages, use, diagnosis)) for stages, use in diagnosis.uses.items()]
    lines += _set_aside(diagnosis)
    if diagnosis.placeholders:
        rows = ", ".join(f"{{{{{name}}}}} in {count:,} rows" for name, count in sorted(diagnosis.placeholders.items()))
        names = ", ".join(f"{name}: TEXT" for name in sorted(diagnosis.placeholders))
        lines.append(_line("unfilled", f"{rows}; fill them with data.placeholders={{{names}}}"))
    lines += _near_duplicates(diagnosis)
    faults, count = diagnosis.faults, diagnosis.num_faults
    lines.append(_line("faulty", f"{count:,} rows" if count else "no row"))
    lines += [_line("", f"{_short_location(fault.where)}: {fault.message}") for fault in faults]
    if count > len(faults):
        lines.append(_line("", f"and {count - len(faults):,} more"))
    return [*lines, _line("to use it", _settings(diagnosis, data))]


def _line(name: str, text: str) -> str:
    return f"  {name:<12} {text}"


def _of_use(stages: str, use: Use, diagnosis: Diagnosis) -> str:
    if stages not in diagnosis.meant_for:
        faults = diagnosis.faulty.first([stages])
        return f"nothing: {faults[0].message}" if faults else "nothing"
    records = NOUNS.get(use.record, use.record.__name__)
    return f"{use.records:,} {records}" + (f", {use.repeated:,} of them repeated" if use.repeated else "")


def _set_aside(diagnosis: Diagnosis) -> Iterator[str]:
    """A line for each reason, with the stages that set rows aside and the first of these rows."""
    for reason, rows in diagnosis.set_aside.items():
        stages = [name for name in diagnosis.meant_for if name in rows.stages()]
        count = rows.count(stages)
        if not count:
            continue
        first = ", ".join(_short_location(error.where) for error in rows.first(stages))
        more = f" and {count - LISTED:,} more" if count > LISTED else ""
        yield _line("set aside", f"{count:,} rows, in {', '.join(stages)}: {reason} ({first}{more})")


def _near_duplicates(diagnosis: Diagnosis) -> Iterator[str]:
    duplicates = diagnosis.near_duplicates.pairs
    summary = f"{len(duplicates):,} rows are nearly the same as an earlier row; keep one of each, or they weigh more"
    yield _line("duplicates", summary if duplicates else "no row")
    for duplicate in duplicates[:_PAIRS]:
        row, earlier = _short_location(duplicate.where), _short_location(duplicate.earlier)
        yield _line("", f"{row} shares {duplicate.share:.0%} of its word sequences with {earlier}")
    if len(duplicates) > _PAIRS:
        yield _line("", f"and {len(duplicates) - _PAIRS:,} more")
    if diagnosis.near_duplicates.passed_over:
        yield _line("", f"only the first {diagnosis.near_duplicates.looked_at:,} distinct rows were compared")


def _settings(diagnosis: Diagnosis, data: SourceConfig) -> str:
    use = best_use(diagnosis)
    if use is None:
        return "no stage can use it"
    stages, _ = use
    stage = stages.rpartition(", ")[2]
    share = math.ceil(100 * diagnosis.num_faults / diagnosis.rows) / 100
    skip = f" stages.{stage}.data.on_error=skip" if diagnosis.num_faults else ""
    skip += f" stages.{stage}.data.max_skipped={share:g}" if share > data.max_skipped else ""
    source = snapshot_name(diagnosis.path) or f"path:{diagnosis.path}"
    chosen = "" if data.split == SourceConfig().split else f" stages.{stage}.data.split={data.split}"
    chosen += f" stages.{stage}.data.subset={data.subset}" if data.subset else ""
    return f"stages.{stage}.data.source={source}{chosen}{skip}"


def _short_location(where: str) -> str:
    """``FILE:LINE`` or ``FILE: row N`` without the folder."""
    return Path(where).name
