"""Scripts without spaces between words, numbers with their nouns, and durations."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

WITHOUT_SPACES = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao and Tibetan; Burmese; Khmer
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9d"  # Japanese
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese
)
"""Characters of scripts that put no spaces between words, as a part of a regular expression."""
_PUNCTUATION = "\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
"""Wide full stops, commas and brackets, which stand between characters that are words."""
_PIECE = re.compile(rf"[{WITHOUT_SPACES}]|[^\s{WITHOUT_SPACES}{_PUNCTUATION}]+")
_BLOCKS_WITH_MARKS = range(0x300, 0x1F000)


def unified(text: str) -> str:
    """Lower-case text in one spelling: Python gives the small letter of İ a second dot, and scripts of India may join
    letters by an invisible character."""
    return text.replace("i\u0307", "i").replace("\u200d", "")


def divided(text: str) -> list[str]:
    """The words of a text with their punctuation, as white space divides it; each character in a script without
    spaces."""
    return text.split() if text.isascii() else _PIECE.findall(text)


@cache
def marks() -> str:
    """Signs that belong to the letter before them, such as the vowels of Hindi, Bengali and Tamil, as a part of a
    regular expression. Its ``\\w`` lacks them, so it would cut words of these languages to pieces."""
    return "".join(char for char in map(chr, _BLOCKS_WITH_MARKS) if unicodedata.category(char)[0] == "M")


@cache
def spaced_word() -> str:
    """A regular expression for letters, digits and underscores of scripts with spaces, with their marks."""
    return rf"[^\W{WITHOUT_SPACES}]+(?:[{marks()}]+[^\W{WITHOUT_SPACES}]*)*"


def counted(count: int, singular: str, plural: str | None = None) -> str:
    """``1 row`` or ``2,000 rows``. ``plural`` is needed if it is not the singular with an s."""
    return f"{count:,} {singular if count == 1 else plural or f'{singular}s'}"


def duration(seconds: float | None) -> str:
    """``41 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def time_taken(seconds: float | None, attempts: int) -> str:
    """``3 min 20 s``, or ``3 min 20 s in 2 attempts``."""
    words = duration(seconds)
    return f"{words} in {attempts} attempts" if words and attempts > 1 else words


def clock_face(seconds: float) -> str:
    """``1:02``, or ``1:01:02`` with hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
