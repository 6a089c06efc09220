"""Keys of earlier versions: what stands in their place, where no likeness of names would tell."""

from __future__ import annotations

from alignment.config.near import suggestion
from alignment.config.stage import PpoConfig

_INSTEAD: dict[tuple[type, str], str] = {
    (PpoConfig, "missing_eos_score"): (
        "it replaced the score of an answer that never ended; now 'missing_eos_penalty', 0 or more, is taken off "
        "that score (missing_eos_penalty=0 in place of null)"
    ),
}


def unknown_key(cls: type, key: str, known: list[str]) -> str:
    """What a fault says of a key that the class does not have."""
    return f"unknown key; {_INSTEAD.get((cls, key)) or suggestion(key, known)}"
