"""Keys and values of earlier versions: what stands in their place, where no likeness of names would tell."""

from __future__ import annotations

from alignment.config.stage import PpoConfig

_INSTEAD: dict[tuple[type, str], str] = {
    (PpoConfig, "missing_eos_score"): (
        "it replaced the score of an answer that never ended; now 'missing_eos_penalty', 0 or more, is taken off "
        "that score (missing_eos_penalty=0 in place of null)"
    ),
}


_INSTEAD_OF_VALUES: dict[str, str] = {
    "house_style": (
        "'house_style' is no rule of the package any more; write 'bundled:quickstart/house_style.py:style', or "
        "'…:style_and_facts' where every row has 'facts'"
    ),
}


def instead_of_value(value: str) -> str | None:
    """What took the place of a source that there was once; None for one that there never was."""
    return _INSTEAD_OF_VALUES.get(value)


def instead_of(cls: type, key: str) -> str | None:
    """What took the place of a key that the class had once; None for a key that it never had."""
    return _INSTEAD.get((cls, key))
