"""Faults in a configuration, collected so that all are reported together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alignment.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One error in a configuration.

    A setting that merely has no effect is noted by a plan, and not refused: its ``reader`` says what would use it.
    Example: ``Fault(where="stages.dpo.bata", message="unknown key; did you mean 'beta'?")``
    """

    where: str
    message: str
    reader: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def refuse(faults: Sequence[Fault]) -> None:
    """Raises an error if there are faults.

    Raises:
        ConfigError: lists every fault, each on its own line.
    """
    if not faults:
        return
    if len(faults) == 1:
        raise ConfigError(faults[0].message, where=faults[0].where)
    lines = "".join(f"\n  {fault}" for fault in faults)
    raise ConfigError(f"{len(faults)} faults in the configuration:{lines}")


def unread_faults(group: Any, default: Any, names: Sequence[str], where: str, reader: str) -> Iterator[Fault]:
    """A fault for each of the group's fields that is not at its default although it has no effect, for settings that
    ask for something which a stage would then not learn or measure.

    A setting at its default is always accepted. ``reader`` says what would use the setting.
    """
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
