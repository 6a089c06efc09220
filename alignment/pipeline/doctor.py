"""``align doctor``: an unknown data file explained, with the settings to write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from alignment.config.data import OnError, SourceConfig
from alignment.data.doctor import USES, Diagnosis, Use, examine
from alignment.data.overlap import HeldOut, Placed
from alignment.data.reading import NAMED, iterate
from alignment.data.records import Prompt
from alignment.data.sources import locate
from alignment.errors import DataError

_PLACES = 8
"""Places that a reason spells out."""
_FIRST = ("dpo", "sft", "ppo", "cpt")
"""The stages for which settings are shown, the one that needs most of a row first."""


def show_diagnosis(console: Console, data: SourceConfig, *, against: str | None = None) -> int:
    """Prints what the file is, and which of its rows stand in ``against`` too; exit code 0, or 3 where rows are faulty.

    Raises:
        DataError: the file cannot be read at all.
    """
    path = _path_of(data.source, where="DATA")
    found = examine(path, data)
    for line in [*_lines(found), *_overlaps(path, data, against)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return DataError.exit_code if found.faults else 0


def _path_of(source: str, *, where: str) -> Path:
    return locate(source if ":" in source else f"path:{source}", where=where)


def _overlaps(path: Path, data: SourceConfig, against: str | None) -> list[str]:
    if against is None:
        return []
    held_out = HeldOut(_asked(_path_of(against, where="--against"), SourceConfig()))
    found = list(held_out.overlaps(_asked(path, data)))
    lines = [_line("overlap", f"{len(found):,} rows ask what {against} asks" if found else f"none with {against}")]
    lines += [
        _line("", f"{_place(one.learned)} has {one.share:.0%} of {_place(one.held_out)}") for one in found[:NAMED]
    ]
    return lines + ([_line("", f"and {len(found) - NAMED:,} more")] if len(found) > NAMED else [])


def _asked(path: Path, data: SourceConfig) -> Iterator[Placed]:
    """What the prompts of a file ask; rows without one are passed over."""
    lenient = replace(data, on_error=OnError.skip, max_skipped=1.0)
    for prompt in iterate(path, Prompt, lenient):
        asked = [turn.content for turn in prompt.messages if turn.role == "user"]
        yield Placed(where=prompt.where, text="\n".join(asked))


def _lines(found: Diagnosis) -> list[str]:
    columns = ", ".join(name if count == found.rows else f"{name} ({count:,})" for name, count in found.columns.items())
    lines = [
        f"{found.path}: {found.rows:,} rows",
        _line("format", f"{found.format.name}: {found.format.summary}"),
        _line("columns", columns),
    ]
    lines += [_line(stages, _of_use(USES[stages][0], use, found)) for stages, use in found.uses.items()]
    for reason, (stages, places) in _set_aside(found).items():
        lines.append(_line("set aside", f"{len(places):,} rows, in {', '.join(stages)}: {reason} ({_listed(places)})"))
    if found.placeholders:
        rows = ", ".join(f"{{{{{name}}}}} in {count:,} rows" for name, count in sorted(found.placeholders.items()))
        names = ", ".join(f"{name}: TEXT" for name in sorted(found.placeholders))
        lines.append(_line("unfilled", f"{rows}; data.placeholders={{{names}}} fills them"))
    lines.append(_line("faulty", f"{len(found.faults):,} rows" if found.faults else "no row"))
    lines += [_line("", f"{_place(fault.where)}: {fault.message}") for fault in found.faults[:NAMED]]
    if len(found.faults) > NAMED:
        lines.append(_line("", f"and {len(found.faults) - NAMED:,} more"))
    return [*lines, _line("to use it", _settings(found))]


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


def _settings(found: Diagnosis) -> str:
    stage = next((stage for stage in _FIRST if any(stage in name for name in found.meant_for)), None)
    if stage is None:
        return "no stage can"
    skip = f" stages.{stage}.data.on_error=skip" if found.faults else ""
    return f"stages.{stage}.data.source=path:{found.path}{skip}"


def _place(where: str) -> str:
    """``FILE:LINE`` or ``FILE: row N`` without the folder."""
    return Path(where).name


def _listed(places: Sequence[str]) -> str:
    more = f" and {len(places) - _PLACES:,} more" if len(places) > _PLACES else ""
    return ", ".join(places[:_PLACES]) + more
