"""Numbers with their nouns, in the singular or the plural."""

from __future__ import annotations


def counted(count: int, singular: str, plural: str | None = None) -> str:
    """``1 row`` or ``2,000 rows``. ``plural`` is needed if it is not the singular with an s."""
    return f"{count:,} {singular if count == 1 else plural or f'{singular}s'}"
