"""Faults in a configuration, collected so that all are reported together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing that cannot be right.

    Example: ``Fault(where="stages.dpo.bata", message="unknown key; did you mean 'beta'?")``
    """

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def refuse(faults: Sequence[Fault]) -> None:
    """Does nothing without faults.

    Raises:
        ConfigError: lists every fault, each on a line of its own.
    """
    if not faults:
        return
    if len(faults) == 1:
        raise ConfigError(faults[0].message, where=faults[0].where)
    lines = "".join(f"\n  {fault}" for fault in faults)
    raise ConfigError(f"{len(faults)} faults in the configuration:{lines}")


def unread_faults(group: Any, default: Any, names: Sequence[str], where: str, reader: str) -> Iterator[Fault]:
    """A fault for each of the group's fields that is not at its default although nothing reads it.

    A setting at its default promises nothing and is let pass. ``reader`` says what would read it.
    """
    for name in names:
        value, usual = getattr(group, name), getattr(default, name)
        if value != usual:
            message = f"{_shown(value)} is read by nothing; {reader} reads it; leave it at {_shown(usual)}"
            yield Fault(where=f"{where}.{name}", message=message)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(getattr(value, "value", value))
