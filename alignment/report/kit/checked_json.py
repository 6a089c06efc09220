"""Parts of what a JSON file held, whatever it holds: what is of another form than it should be counts as absent."""

from __future__ import annotations

from typing import Any

from alignment.records.interval import Interval
from alignment.report.kit import text


def part(raw: Any, key: str) -> Any:
    """What stands under a key, or None."""
    return raw.get(key) if isinstance(raw, dict) else None


def items(raw: Any, key: str) -> list[Any]:
    """The list under a key, or an empty one."""
    value = part(raw, key)
    return value if isinstance(value, list) else []


def mapping(raw: Any, key: str) -> dict[str, Any]:
    """The mapping under a key, or an empty one."""
    value = part(raw, key)
    return value if isinstance(value, dict) else {}


def interval(raw: Any) -> Interval | None:
    """An interval; a bare number is a mean without bounds."""
    if not isinstance(raw, dict):
        mean = text.finite(raw)
        return None if mean is None else Interval(mean=mean)
    mean, low, high = (text.finite(raw.get(key)) for key in ("mean", "low", "high"))
    if mean is None:
        return None
    return Interval(mean=mean, low=low, high=high) if low is not None and high is not None else Interval(mean=mean)
