"""The name a user probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

_CLOSE = 0.6


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option most like ``name``, or None where none is close.

    Names that start alike win a tie, since the first letter is seldom the misspelt one: ``bata`` is ``beta``, not
    ``data``.
    """

    def likeness(option: str) -> tuple[float, bool]:
        ratio = SequenceMatcher(None, name.lower(), option.lower()).ratio()
        return ratio, option[:1].lower() == name[:1].lower()

    best = max(options, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= _CLOSE else None


def suggestion(name: str, options: Iterable[str]) -> str:
    """``did you mean 'beta'?`` where one is close, else the list of what there is."""
    known = list(options)
    if not known:
        return "there is none to choose from"
    best = nearest(name, known)
    return f"did you mean '{best}'?" if best else f"one of: {', '.join(known)}"
