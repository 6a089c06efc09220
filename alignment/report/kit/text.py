"""Formats numbers and names for a reader."""

from __future__ import annotations

import json
import math
import sys
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from alignment.core import typed_json
from alignment.core.errors import ArtifactError
from alignment.core.typed_json import Cleaning, NewerVersion, Record
from alignment.records.interval import Interval

MINUS = "\u2212"


def number(value: float | None, digits: int = 2) -> str:
    """``0.71``, ``−3.20``, or a dash if nothing was measured."""
    if value is None:
        return "–"
    text = f"{abs(value):,.{digits}f}".replace(",", "\u202f")
    return MINUS + text if value < 0 and float(f"{value:.{digits}f}") != 0 else text


def signed(value: float, digits: int = 3) -> str:
    """``+0.080`` or ``−0.012``: a difference always carries its sign."""
    text = number(value, digits)
    return text if text.startswith(MINUS) or float(f"{value:.{digits}f}") == 0 else f"+{text}"


def share(value: float | None) -> str:
    """``99 %``. A share just below one never reads as 100 %, since the missing part is what matters."""
    if value is None:
        return "–"
    percent = value * 100
    if 99 < percent < 100 or 0 < percent < 1:
        if 0.05 <= percent < 99.95:
            return f"{percent:.1f}\u202f%"
        return "> 99.9\u202f%" if percent > 50 else "< 0.1\u202f%"
    return f"{percent:.0f}\u202f%"


def probability(value: float) -> str:
    """``0.032``, or ``< 0.001``; one below 0.05 never reads as 0.050."""
    if value < 0.001:
        return "<\u202f0.001"
    shown = f"{value:.3f}"
    return "0.049" if shown == "0.050" and value < 0.05 else shown


def compact(value: float) -> str:
    """Three significant digits, for labels in a plot: ``0.693``, ``−41.2``, ``12.4k``, ``3.1e-05``."""
    size = abs(value)
    sign = MINUS if value < 0 else ""
    if size == 0:
        return "0"
    if size >= 1e6 or size < 1e-3:
        return sign + f"{size:.1e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    if size >= 1e4:
        return f"{sign}{size / 1000:.3g}k" if size < 999_500 else f"{sign}{size / 1e6:.3g}M"
    digits = max(0, 2 - math.floor(math.log10(size)))
    return f"{sign}{size:.{digits}f}"


def duration(seconds: float | None) -> str:
    """``41 s``, ``4 min 12 s``, ``1 h 05 min``."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f}\u202fs"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}\u202fs"
    if whole < 3600:
        return f"{whole // 60}\u202fmin {whole % 60:02d}\u202fs"
    return f"{whole // 3600}\u202fh {whole % 3600 // 60:02d}\u202fmin"


def memory(size: float | None) -> str:
    """Bytes as ``512 MB`` or ``4.3 GB`` (powers of ten)."""
    if size is None:
        return "–"
    return f"{size / 1e9:.1f}\u202fGB" if size >= 1e9 else f"{size / 1e6:.0f}\u202fMB"


def name(value: Any, limit: int = 80) -> str:
    """A name on one line, without control and direction-changing characters, which could affect the text around it."""
    visible = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in str(value))
    line = " ".join(visible.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def path_end(value: Any, limit: int = 80) -> str:
    """Like ``name``, but of a long one the end is kept: paths to several models often begin alike."""
    line = name(value, limit=sys.maxsize)
    return line if len(line) <= limit else "…" + line[1 - limit :]


def prose(value: Any) -> str:
    """Text of several lines, with a visible mark for characters that HTML cannot hold or that would reorder it.
    Right-to-left letters need no overrides; an override in a model's answer only hides its content."""
    return "".join("\ufffd" if _unwelcome(c) else c for c in str(value))


def _unwelcome(c: str) -> bool:
    if c in "\n\t\r":
        return False
    return unicodedata.category(c) in ("Cc", "Cs") or "\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069"


def bounds(item: Interval | None, digits: int = 2, form: Callable[[float, int], str] = number) -> str:
    """``0.66 to 0.75``, or "" if no interval was recorded."""
    if item is None or item.low is None or item.high is None:
        return ""
    return f"{form(item.low, digits)} to {form(item.high, digits)}"


def listing(items: list[str], word: str = "and") -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}"


def finite(value: Any) -> float | None:
    """The number, or None for anything that cannot be drawn: not a number, not finite, or absurdly large."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) and abs(result) < 1e30 else None


FOR_A_PAGE = Cleaning(
    prose=prose, line=name, name=path_end, number=lambda value: None if finite(value) is None else value
)


def shown(path: Path, kind: type[Record]) -> tuple[Record | None, str]:
    """The record in a file, cleaned for a page, or None with the reason in words."""
    try:
        record = typed_json.read_parts(path, kind, FOR_A_PAGE)
    except NewerVersion:
        return None, f"The file {path.name} was written by a newer version and is not shown."
    except (ArtifactError, OSError):
        record = None
    return record, "" if record is not None else f"The file {path.name} cannot be read."


def flat(tree: Any, key: str = "") -> dict[str, Any]:
    """Values by dotted key: ``{"scorers": [{"source": "reward"}]}`` gives ``scorers[0].source``. A list of plain values
    is one value, and so is an empty mapping or list."""
    if isinstance(tree, Mapping) and tree:
        branches = [(f"{key}.{name}" if key else str(name), value) for name, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(item, (Mapping, list)) for item in tree):
        branches = [(f"{key}[{index}]", value) for index, value in enumerate(tree)]
    else:
        return {key: tree} if key else {}
    return {inner: value for branch, item in branches for inner, value in flat(item, branch).items()}


def setting_text(value: Any) -> str:
    """A value of a setting: ``not set`` for null, ``none`` for an empty list or mapping, text as it is, else JSON."""
    if value is None:
        return "not set"
    if isinstance(value, str):
        return value
    if isinstance(value, (Mapping, list)) and not value:
        return "none"
    return json.dumps(value, ensure_ascii=False, default=str)
