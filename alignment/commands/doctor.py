"""``align doctor``: what a data file contains and what is wrong with it."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from alignment.commands.shared.diagnoses import RowProgress, best_use, examined, path_of, progress_of
from alignment.config.data import SourceConfig
from alignment.config.faults import Fault, refuse
from alignment.config.typed import source_from_plain
from alignment.core.errors import DataError
from alignment.core.wording import counted
from alignment.data.doctor import LISTED, Diagnosis, Use, counted_records
from alignment.data.formats import FORMATS, LABEL, UnknownColumns
from alignment.data.near_duplicates import RelatedRow
from alignment.data.overlap import HeldOut, asked_in
from alignment.data.reading import NAMED, doctor_command, written
from alignment.data.records import LabelledAnswer, PreferencePair
from alignment.data.source_files import snapshot_name
from alignment.pipeline.execute.signals import INTERRUPTED
from alignment.pipeline.plan import settings
from alignment.pipeline.plan.compose import tree_of

_SOURCE = ("format", "split", "subset")
"""Options that are settings of the source."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A data file, how to read it, and another one to compare it with."""
    parser.description = (
        "Shows the format of a data file, which kinds of stage can use it, and which rows are faulty and why."
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="a data file or a folder of them, bundled:NAME, or hub:ORG/NAME@REVISION")
    add(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="a setting of the data, as in a recipe: columns='{prompt: my_question}' or placeholders='{name: Ada}'",
    )
    add("--format", choices=sorted(FORMATS), help="read the rows in this format (default: the columns decide)")
    add("--split", help="the split of DATA, if that is on a hub (default: train)")
    add("--subset", help="the subset of DATA, if that is on a hub and has several")
    add(
        "--against",
        metavar="DATA",
        help="also list the rows whose prompts or texts overlap with this file, such as the data of an evaluation",
    )
    add("--against-split", metavar="SPLIT", help="the split of --against, if that is on a hub (default: train)")
    add("--against-subset", metavar="SUBSET", help="the subset of --against, if it has several")


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Explains the file; returns the exit code."""
    chosen = {name: getattr(arguments, name) for name in _SOURCE if getattr(arguments, name)}
    data = source_of(arguments.data, chosen, arguments.overrides)
    against = against_of(arguments.against, split=arguments.against_split, subset=arguments.against_subset)
    return show_diagnosis(console, data, against=against)


UNREAD = ("limit", "on_error", "max_skipped")
"""Settings that say which rows a stage uses; doctor examines all."""
AGAINST = "--against"
"""The option that names the source to compare with."""
EXAMPLE = "columns={prompt: my_question}"


def source_of(source: str, options: Mapping[str, str], overrides: Sequence[str]) -> SourceConfig:
    """The source that the command line describes; ``overrides`` are parsed and checked like those of a recipe. Raises
    ConfigError: lists every fault."""
    given, faults = tree_of(overrides, example=EXAMPLE)
    faults += _unusable(given, options)
    data, wrong = source_from_plain({**given, **options}, where="")
    refuse([*faults, *wrong])
    return replace(data, source=source)


def against_of(source: str | None, *, split: str | None, subset: str | None) -> SourceConfig | None:
    """The source to compare with; None if there is none. Raises ConfigError."""
    if source is not None:
        return SourceConfig(source=source, split=split or SourceConfig().split, subset=subset or None)
    chosen = [name for name, value in (("split", split), ("subset", subset)) if value]
    refuse([Fault(where=f"{AGAINST}-{name}", message=f"has no effect without {AGAINST}") for name in chosen])
    return None


def _unusable(given: Mapping[str, Any], options: Mapping[str, str]) -> Iterator[Fault]:
    for name in given:
        if name == "source":
            yield Fault(where=name, message="the data is named already; leave this out")
        if name in UNREAD:
            yield Fault(where=name, message="has no effect; doctor examines every row; leave it out")
        if name in options:
            yield Fault(where=name, message=f"is also given as --{name}; give one")


_PAIRS = 5
"""Rows that repeat, contradict or resemble an earlier row and are listed."""
_CONTRADICTS = {PreferencePair: "prefers the answer that {} rejects", LabelledAnswer: "has the opposite label of {}"}


def show_diagnosis(console: Console, data: SourceConfig, *, against: SourceConfig | None = None) -> int:
    """Prints what the file is, and which of its rows are also in the source ``against``; returns 0 or 3. It returns 3
    if rows are faulty, if no stage can use the file, or if a column is misspelt in every row, so that the file is read
    in a format that it is not meant for. A hub's data set that is not on this machine is downloaded. After Ctrl-C it
    prints what it knows of the rows so far, and returns 130. Raises ConfigError, DataError."""
    of_other = [] if against is None else list(settings.source_faults(against, AGAINST))
    refuse([*settings.source_faults(data, ""), *settings.column_faults(data, ""), *of_other])

    def print_line(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    path = path_of(data.source, where=data.source, announce=print_line)
    other = None if against is None else path_of(against.source, where=AGAINST, announce=print_line)
    try:
        diagnosis, is_whole = examined(console, path, data)
    except UnknownColumns as error:
        command = _command(data, {"prompt": "YOURS"})
        remedy = f"map your columns to those of a format, such as: {command}; formats: {', '.join(FORMATS)}"
        raise DataError(error.message, where=error.where, remedy=remedy) from error
    if not is_whole:
        print_line(f"interrupted; of the first {diagnosis.rows:,} rows:")
    for line in _lines(diagnosis, data):
        print_line(line)
    if not is_whole:
        return INTERRUPTED
    if against is not None and other is not None:
        for line in _overlaps(path, data, against, other, progress_of(console, path, data)):
            print_line(line)
    is_bad = diagnosis.num_faults or diagnosis.is_useless or diagnosis.misspelt_format is not None
    return DataError.exit_code if is_bad else 0


def _overlaps(path: Path, data: SourceConfig, against: SourceConfig, other: Path, progress: RowProgress) -> list[str]:
    held_out = HeldOut(asked_in(other, against))
    overlaps = held_out.overlaps(progress.watched(asked_in(path, data)))
    first = list(islice(overlaps, NAMED))
    more = sum(1 for _ in overlaps)
    count = len(first) + more
    rows = counted(count, "row resembles a prompt", "rows resemble prompts") if count else "no row resembles a prompt"
    lines = [_line("overlap", f"{rows} of {_source_name(against)}")]
    lines += [
        _line("", f"{_short_location(row.learned)} has {row.share:.0%} of {_short_location(row.held_out)}")
        for row in first
    ]
    return lines + ([_line("", f"and {more:,} more")] if more else [])


def _source_name(data: SourceConfig) -> str:
    if not data.source.startswith("hub:"):
        return data.source
    subset = "" if data.subset is None else f", subset {data.subset}"
    return f"{data.source}{subset}, split {data.split}"


def _lines(diagnosis: Diagnosis, data: SourceConfig) -> list[str]:
    columns = ", ".join(
        name if count == diagnosis.rows else f"{name} ({count:,})" for name, count in diagnosis.columns.items()
    )
    lines = [
        f"{snapshot_name(diagnosis.path) or diagnosis.path}: {counted(diagnosis.rows, 'row')}",
        _line("format", f"{diagnosis.format.name}: {diagnosis.format.summary}"),
        _line("columns", columns),
    ]
    lines += [_line(stages, _of_use(stages, use, diagnosis)) for stages, use in diagnosis.uses.items()]
    lines += _set_aside(diagnosis)
    if diagnosis.placeholders:
        rows = ", ".join(
            f"{{{{{name}}}}} in {counted(count, 'row')}" for name, count in sorted(diagnosis.placeholders.items())
        )
        names = ", ".join(f"{name}: TEXT" for name in sorted(diagnosis.placeholders))
        lines.append(_line("unfilled", f"{rows}; fill them with data.placeholders={{{names}}}"))
    lines += _misspelt(diagnosis, data)
    for name in diagnosis.likely_labels:
        lines.append(_line("label?", f"{name!r} is true or false in every row; if it says whether the answer is good:"))
        lines.append(_line("", _command(data, {LABEL: name})))
    for name, count in diagnosis.not_finite.items():
        rows = counted(count, "row has", "rows have")
        lines.append(_line("not finite", f"{rows} NaN or infinity in the column {name!r}; correct it, or write null"))
    lines += [*_duplicates(diagnosis), *_contradictions(diagnosis)]
    faults, count = diagnosis.faults, diagnosis.num_faults
    lines.append(_line("faulty", counted(count, "row") if count else "no row"))
    lines += [_line("", f"{_short_location(fault.where)}: {fault.message}") for fault in faults]
    if count > len(faults):
        lines.append(_line("", f"and {count - len(faults):,} more"))
    if diagnosis.num_not_utf8:
        lines.append(_line("", _encoding(diagnosis)))
    return [*lines, _line("to use it", _settings(diagnosis, data))]


def _line(name: str, text: str) -> str:
    return f"  {name:<12} {text}"


def _of_use(stages: str, use: Use, diagnosis: Diagnosis) -> str:
    if stages not in diagnosis.meant_for:
        faults = diagnosis.faulty.first([stages])
        return f"nothing: {faults[0].message}" if faults else "nothing"
    repeated = f", {use.repeated:,} of them repeated" if use.repeated else ""
    return counted_records(use.records, use.record) + repeated


def _set_aside(diagnosis: Diagnosis) -> Iterator[str]:
    """A line for each reason, with the stages that set rows aside and the first of these rows."""
    for reason, rows in diagnosis.set_aside.items():
        stages = [name for name in diagnosis.meant_for if name in rows.stages()]
        count = rows.count(stages)
        if not count:
            continue
        first = ", ".join(_short_location(error.where) for error in rows.first(stages))
        more = f" and {count - LISTED:,} more" if count > LISTED else ""
        yield _line("set aside", f"{counted(count, 'row')}, in {', '.join(stages)}: {reason} ({first}{more})")


def _misspelt(diagnosis: Diagnosis, data: SourceConfig) -> Iterator[str]:
    for column, known in diagnosis.misspelt_columns.items():
        remedy = f"If so, rename it, or set data.columns={{{known}: {column}}}"
        yield _line("misspelt?", f"nothing reads the column '{column}'; did you mean '{known}'? {remedy}")
    meant = diagnosis.misspelt_format
    if meant is not None:
        formats = f"{diagnosis.format.name}, not as {meant.name}: {meant.summary}"
        yield _line("", f"until then, every row is read as {formats}")
    if diagnosis.misspelt_columns:
        columns = {known: column for column, known in diagnosis.misspelt_columns.items()}
        yield _line("", f"to try these columns: {_command(data, columns)}")


def _listed(name: str, headline: str, count: int, rows: Iterable[str]) -> Iterator[str]:
    """A headline, the first of ``count`` rows, and how many others there are; nothing if there are none."""
    if count:
        yield _line(name, headline)
        yield from (_line("", row) for row in islice(rows, _PAIRS))
    if count > _PAIRS:
        yield _line("", f"and {count - _PAIRS:,} more")


def _related(row: RelatedRow, relation: str) -> str:
    return f"{_short_location(row.where)} {relation.format(_short_location(row.earlier or 'an earlier row'))}"


def _duplicates(diagnosis: Diagnosis) -> Iterator[str]:
    exact, near = diagnosis.repeats.num_exact, diagnosis.near_duplicates.pairs
    weight = {True: "keep one of each, or it weighs more", False: "keep one of each, or they weigh more"}
    headline = f"{counted(exact, 'row repeats', 'rows repeat')} an earlier row exactly; {weight[exact == 1]}"
    repeats = (_related(row, "repeats {}") for row in diagnosis.repeats.exact)
    yield from _listed("duplicates", headline, exact, repeats)
    are = counted(len(near), "row is", "rows are")
    headline = f"{are} nearly the same as an earlier row; {weight[len(near) == 1]}"
    shares = (
        f"{_short_location(pair.where)} shares {pair.share:.0%} of its word sequences with "
        f"{_short_location(pair.earlier)}"
        for pair in near
    )
    yield from _listed("duplicates", headline, len(near), shares)
    if not exact and not near:
        yield _line("duplicates", "no row")
    if diagnosis.near_duplicates.passed_over:
        yield _line("", f"only the first {diagnosis.near_duplicates.looked_at:,} distinct rows were compared")


def _contradictions(diagnosis: Diagnosis) -> Iterator[str]:
    count = diagnosis.repeats.num_contradictions
    says = counted(count, "row says", "rows say")
    headline = f"{says} the opposite of an earlier row; correct it or remove one of the two"
    rows = (_related(row, _CONTRADICTS[row.record]) for row in diagnosis.repeats.contradictions)
    yield from _listed("contradict", headline, count, rows)


def _encoding(diagnosis: Diagnosis) -> str:
    """What to do about lines that are not UTF-8: in a file with other special characters, only these are wrong."""
    count = diagnosis.num_not_utf8
    are = counted(count, "line is", "lines are")
    if diagnosis.has_non_ascii:
        return f"{are} not UTF-8, but other lines are: correct only {'this line' if count == 1 else 'these lines'}"
    convert = f"iconv -f LATIN1 -t UTF-8 {shlex.quote(str(diagnosis.path))} > NEW_FILE"
    return f"{are} not UTF-8, and the others have only ASCII characters; if the file is Latin-1, convert it: {convert}"


def _settings(diagnosis: Diagnosis, data: SourceConfig) -> str:
    use = best_use(diagnosis)
    if use is None or diagnosis.is_useless:
        return "no stage can use it"
    stages, _ = use
    stage = stages.rpartition(", ")[2]
    share = math.ceil(100 * diagnosis.num_faults / diagnosis.rows) / 100
    skip = f" stages.{stage}.data.on_error=skip" if diagnosis.num_faults else ""
    skip += f" stages.{stage}.data.max_skipped={share:g}" if share > data.max_skipped else ""
    source = snapshot_name(diagnosis.path) or f"path:{diagnosis.path}"
    chosen = "".join(f" {shlex.quote(word)}" for word in written(data, f"stages.{stage}.data."))
    return f"{shlex.quote(f'stages.{stage}.data.source={source}')}{chosen}{skip}"


def _command(data: SourceConfig, columns: Mapping[str, str]) -> str:
    """The command that examines the same data with these columns mapped too."""
    return doctor_command(data.source, replace(data, columns={**data.columns, **columns}))


def _short_location(where: str) -> str:
    """``FILE:LINE`` or ``FILE: row N`` without the folder."""
    return Path(where).name
