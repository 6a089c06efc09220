"""Times as a user reads them."""

from __future__ import annotations


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
