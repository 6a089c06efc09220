"""How many rows a stage left out or cut, and why, from the list in its artifact (alignment/records/stages.py)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignment.core.files import parse_json
from alignment.records.stages import CUT, FAULT, LEFT_OUT_FILE, LOST, TOO_LONG
from alignment.report.kit import text
from alignment.report.run_page.run_records import LeftOutRows

MOST = 8
"""Reasons that are shown of a stage; the rarest others are added up."""
_WORDS = {FAULT: "faulty", TOO_LONG: "too long", CUT: "cut, because it was too long"}
_OTHER = "other reasons"
_UNREADABLE = f"a line of {LEFT_OUT_FILE} that cannot be read"


def read_left_out(folder: Path | None, notes: list[str]) -> list[LeftOutRows]:
    """The rows of an artifact's list by reason, the most frequent first; empty without a list.

    If there is one and it cannot be read, ``notes`` gets a sentence that says so.
    """
    if folder is None:
        return []
    try:
        state = (folder / LEFT_OUT_FILE).stat()
        return list(_counted(folder / LEFT_OUT_FILE, state.st_mtime_ns, state.st_size))
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(
            f"Its {LEFT_OUT_FILE} cannot be read ({type(error).__name__}), so rows that it left out are not shown."
        )
        return []


@functools.lru_cache(maxsize=64)
def _counted(file: Path, _changed: int, _size: int) -> tuple[LeftOutRows, ...]:
    """Counted once for each state of a file, because `align watch` draws the page again and again."""
    counts: dict[str, int] = {}
    first: dict[str, str] = {}
    last: dict[str, str] = {}
    for why, where, row in _reasons(file):
        if where and last.get(why) == where:
            continue  # another record of the same row, such as the other answer of a pair
        counts[why] = counts.get(why, 0) + 1
        first.setdefault(why, row)
        last[why] = where
    by_count = sorted(counts, key=lambda why: (-counts[why], why))
    shown = by_count if len(by_count) <= MOST else by_count[: MOST - 1]
    rows = [LeftOutRows(why=why, count=counts[why], first=first[why]) for why in shown]
    if others := by_count[len(shown) :]:
        rows.append(LeftOutRows(why=_OTHER, count=sum(counts[why] for why in others), first=first[others[0]]))
    return tuple(rows)


def _reasons(file: Path) -> Iterator[tuple[str, str, str]]:
    """Why each row is in the list, where the row is, and the row with what is said of it, cleaned for a page."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                where = str(row.get("where", ""))
                name = where.rpartition("/")[2]
                yield _why(row), where, text.name(f"{name}: {row.get('reason', '')}", limit=160)
            else:
                yield _UNREADABLE, "", "–"


def _why(row: dict[str, Any]) -> str:
    """The kind of the row, or its reason if the reason is the same for all rows like it."""
    kind = str(row.get("kind", ""))
    if kind.startswith(LOST):
        return text.name(f"the chat template leaves out {kind.partition(': ')[2]}")
    return _WORDS.get(kind) or text.name(row.get("reason", kind))
