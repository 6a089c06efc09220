"""Choices and values of earlier versions, and what replaces them."""

from __future__ import annotations

from enum import Enum

from alignment.config.evaluating import JudgeKind

_INSTEAD_OF_CHOICES = {
    ("launch", "slurm"): "where stages run is now a separate choice; write launch/backend=slurm",
}
_INSTEAD_OF_SOURCES: dict[str, str] = {
    "house_style": (
        "'house_style' is no longer a rule of the package; write 'bundled:quickstart/house_style.py:style', or "
        "'…:style_and_facts' where every row has 'facts'"
    ),
}
_INSTEAD_OF_VALUES: dict[tuple[type[Enum], str], str] = {
    (JudgeKind, "rule"): "'rule' is now 'metric': the evaluation's primary metric judges",
}


def instead_of_choice(group: str, choice: str) -> str | None:
    """What replaces a file that the group had in an earlier version; None if it never had it."""
    return _INSTEAD_OF_CHOICES.get((group, choice))


def instead_of_source(value: str) -> str | None:
    """What replaces a source of an earlier version; None if there never was such a source."""
    return _INSTEAD_OF_SOURCES.get(value)


def instead_of_value(kind: type[Enum], value: str) -> str | None:
    """What replaces a value that this type had in an earlier version; None if it never had it."""
    return _INSTEAD_OF_VALUES.get((kind, value))
