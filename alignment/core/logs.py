"""A log that a stage may write without end, and that stays small: its beginning and its end are kept.

The process that writes it has it open for appending, so it can be cut behind its back: the next line goes to the new
end. What is written between two looks is not limited; a look is taken twice a second.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

LIMIT = 16 << 20
"""Bytes above which the middle of a log goes."""
HEAD, TAIL = 1 << 20, 4 << 20
"""Bytes that stay, of the beginning and of the end."""
CUT = b"\n[... the middle of this log was left out: it was longer than it may be ...]\n"


def shorten(log: Path) -> None:
    """Cuts the middle out of a log that has become too long. One that cannot be cut stays as it is."""
    with suppress(OSError):  # a stage does not end because of its log
        if log.stat().st_size > LIMIT:
            _cut(log)


def _cut(log: Path) -> None:
    """The end is written over the middle before anything goes, so that a disk that is full costs none of it."""
    with log.open("r+b") as file:
        file.seek(-TAIL, os.SEEK_END)
        end = file.read(TAIL)
        read_to = file.tell()
        file.seek(HEAD)
        file.write(CUT + end[end.find(b"\n") + 1 :])  # whole lines, unless all is one
        write_to = file.tell()
        file.seek(read_to)
        meanwhile = file.read(TAIL)
        file.seek(write_to)
        file.write(meanwhile)
        file.flush()
        file.truncate()
