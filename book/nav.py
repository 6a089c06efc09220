"""The nav of mkdocs.yml: its patterns, such as ``design/*.md``, stand for the pages that it does not name itself."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any


def expanded(nav: Sequence[Any], pages: Sequence[str]) -> list[Any]:
    """The nav with each pattern replaced by the pages that fit it, in their order; ``pages`` are all names."""
    taken = {name for name in names(nav) if "*" not in name}
    return [part for item in nav for part in _parts(item, [page for page in sorted(pages) if page not in taken])]


def _parts(item: Any, free: Sequence[str]) -> list[Any]:
    if isinstance(item, dict):
        return [{title: _inside(value, free) for title, value in item.items()}]
    return fnmatch.filter(free, item) if "*" in item else [item]


def _inside(value: Any, free: Sequence[str]) -> Any:
    return [part for item in value for part in _parts(item, free)] if isinstance(value, list) else value


def names(nav: Any) -> Iterator[str]:
    """Every page or pattern that a nav names."""
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from names(item)
