"""The name a user probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

_CLOSE = 0.6


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option most similar to ``name``, or None if none is close.

    Names with the same first letter win a tie, because it is seldom misspelt: ``bata`` is ``beta``, not ``data``.
    """

    def likeness(option: str) -> tuple[float, bool]:
        ratio = SequenceMatcher(None, name.lower(), option.lower()).ratio()
        return ratio, option[:1].lower() == name[:1].lower()

    best = max(options, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= _CLOSE else None


def suggestion(name: str, options: Iterable[str]) -> str:
    """``did you mean 'beta'?`` if an option is close, otherwise the list of options."""
    known = list(options)
    if not known:
        return "there are none to choose from"
    best = nearest(name, known)
    return f"did you mean '{best}'?" if best else f"one of: {', '.join(known)}"
