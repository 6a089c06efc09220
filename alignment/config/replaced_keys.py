"""Choices and values of earlier versions, and what replaces them."""

from __future__ import annotations

from enum import Enum

from alignment.config.evaluating import JudgeKind

_INSTEAD_OF_CHOICES = {
    ("launch", "slurm"): "where stages run is a choice of its own now; write launch/backend=slurm",
}
_INSTEAD_OF_SOURCES: dict[str, str] = {
    "house_style": (
        "'house_style' is no rule of the package any more; write 'bundled:quickstart/house_style.py:style', or "
        "'…:style_and_facts' where every row has 'facts'"
    ),
}
_INSTEAD_OF_VALUES: dict[tuple[type[Enum], str], str] = {
    (JudgeKind, "rule"): "'rule' is now 'metric': the evaluation's primary metric judges",
}


def instead_of_choice(group: str, choice: str) -> str | None:
    """What replaces a file that the group once had; None for one that it never had."""
    return _INSTEAD_OF_CHOICES.get((group, choice))


def instead_of_source(value: str) -> str | None:
    """What took the place of a source that there was once; None for one that there never was."""
    return _INSTEAD_OF_SOURCES.get(value)


def instead_of_value(kind: type[Enum], value: str) -> str | None:
    """What replaces a value that a setting of this kind once had; None for one that it never had."""
    return _INSTEAD_OF_VALUES.get((kind, value))
