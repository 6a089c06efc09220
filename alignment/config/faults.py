"""Faults in settings, and the near names that their messages propose."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from alignment.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One error in a configuration.

    A setting that merely has no effect is noted by a plan, and not refused: its ``reader`` says what would use it.
    Example: ``Fault(where="stages.dpo.bata", message="unknown key; did you mean 'beta'?")``"""

    where: str
    message: str
    reader: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def refuse(faults: Sequence[Fault]) -> None:
    """Raises ConfigError if there are faults; it lists each on its own line."""
    if not faults:
        return
    if len(faults) == 1:
        raise ConfigError(faults[0].message, where=faults[0].where)
    lines = "".join(f"\n  {fault}" for fault in faults)
    raise ConfigError(f"{len(faults)} faults in the configuration:{lines}")


def unread_faults(group: Any, default: Any, names: Sequence[str], where: str, reader: str) -> Iterator[Fault]:
    """A fault for each of the group's fields that is not at its default although it has no effect, for settings that
    ask for something which a stage would then not learn or measure. A setting at its default is always accepted.
    ``reader`` says what would use the setting."""
    for name in names:
        value, usual = getattr(group, name), getattr(default, name)
        if value != usual:
            message = f"{_shown(value)} has no effect; {reader} uses it; leave it at {_shown(usual)}"
            yield Fault(where=f"{where}.{name}", message=message)


def unread_notes(group: Any, default: Any, names: Sequence[str], where: str, reader: str) -> Iterator[Fault]:
    """The same for other settings, which a plan only notes."""
    for fault in unread_faults(group, default, names, where, reader):
        yield replace(fault, reader=reader)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(getattr(value, "value", value))


_CLOSE = 0.6
_MISSPELT = 0.8
_ADDRESS = re.compile(r"https?://[^/]+/(?:datasets/)?|hf:(?://)?")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?:@[\w./-]+)?")
_OF_FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz", ".txt", ".jinja", ".gguf", ".bin", ".safetensors")


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option most similar to ``name``, or None if none is close. Names with the same first letter win a tie,
    because it is seldom misspelt: ``bata`` is ``beta``, not ``data``."""

    return _nearest(name, options, at_least=_CLOSE)


def misspelt(name: str, options: Iterable[str]) -> str | None:
    """The option that ``name`` differs from by a letter or two, or None; for names that may also be right."""
    return _nearest(name, [option for option in options if option != name], at_least=_MISSPELT)


def _nearest(name: str, options: Iterable[str], *, at_least: float) -> str | None:
    def likeness(option: str) -> tuple[float, bool]:
        ratio = SequenceMatcher(None, name.lower(), option.lower()).ratio()
        return ratio, option[:1].lower() == name[:1].lower()

    best = max(options, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= at_least else None


def suggestion(name: str, options: Iterable[str]) -> str:
    """``did you mean 'beta'?`` if an option is close, otherwise the list of options."""
    known = list(options)
    if not known:
        return "there are none to choose from"
    best = nearest(name, known)
    return f"did you mean '{best}'?" if best else f"one of: {', '.join(known)}"


def as_path(source: str) -> str:
    """``write path:FILE`` for a source that lacks this scheme; empty for another text."""
    looks_like_path = source.startswith((".", "/", "~")) or source.endswith(_OF_FILES)
    is_there = bool(source) and ":" not in source and Path(source).expanduser().exists()
    return f"write path:{source}" if looks_like_path or is_there else ""


def with_scheme(source: str) -> str:
    """``write hub:ORG/NAME`` or ``write path:FOLDER`` for a source without its scheme; empty for another text. A name
    that may be either is a path if it exists."""
    name = _ADDRESS.sub("", source).rstrip("/")
    if (path := as_path(source)) or not _REPOSITORY.fullmatch(name):
        return path
    return f"write hub:{name}" if name != source else f"write hub:{name} (or path:{name} for a folder of yours)"
