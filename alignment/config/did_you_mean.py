"""The name a user probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

_CLOSE = 0.6
_MISSPELT = 0.8


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option most similar to ``name``, or None if none is close.

    Names with the same first letter win a tie, because it is seldom misspelt: ``bata`` is ``beta``, not ``data``.
    """

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
