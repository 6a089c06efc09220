"""A log that a stage may write without end, and that stays small: its beginning and its end are kept.

The process that writes it has it open for appending, so it can be cut behind its back: the next line goes to the new
end. What is written between two looks is not limited; a look is taken twice a second.
"""

from __future__ import annotations

import os
from pathlib import Path

LIMIT = 16 << 20
"""Bytes above which the middle of a log goes."""
HEAD, TAIL = 1 << 20, 4 << 20
"""Bytes that stay, of the beginning and of the end."""
CUT = b"\n[... the middle of this log was left out: it was longer than it may be ...]\n"


def shorten(log: Path) -> None:
    """Cuts the middle out of a log that has become too long."""
    try:
        if log.stat().st_size <= LIMIT:
            return
    except FileNotFoundError:
        return
    with log.open("r+b") as file:
        file.seek(-TAIL, os.SEEK_END)
        end = file.read(TAIL)
        file.truncate(HEAD)
    with log.open("ab", buffering=0) as file:
        file.write(CUT + end.partition(b"\n")[2])
