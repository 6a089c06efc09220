"""Faults in a configuration, collected so that all are reported together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
