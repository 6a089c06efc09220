"""Separates the attempts in the log of a stage, and keeps the log small: only its beginning and its end stay.

The process that writes the log has it open for appending, so another process can cut it: the next line goes to the new
end. The log is checked twice a second; it may grow without a limit in between.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

LIMIT = 16 << 20
"""Size in bytes above which the middle of a log is removed."""
HEAD, TAIL = 1 << 20, 4 << 20
"""Bytes of the beginning and of the end that stay."""
_BEGIN = re.compile(rb"^=== \d{4}-\d\d-\d\dT\S+  .+ ===$", re.MULTILINE)
"""The line of ``begin_attempt``."""
CUT = b"\n[... the middle of this log was left out: it was longer than it may be ...]\n"


def begin_attempt(log: Path, attempt: str) -> None:
    """Appends a line that says which attempt writes what follows; a log that cannot be written stays as it is.

    Example: ``=== 2026-11-29T03:22:59+00:00  attempt 2 at dpo-91c0aa17 ===``.
    """
    line = f"=== {datetime.now(UTC).isoformat(timespec='seconds')}  {attempt} ===\n"
    with suppress(OSError), log.open("a+b") as file:
        if size := file.tell():
            file.seek(size - 1)
            line = line if file.read() == b"\n" else f"\n{line}"  # a process that was killed may end in half a line
        file.write(line.encode())


def of_last_attempt(log: Path) -> bytes:
    """What the attempt that began last has written, as far as it was not left out."""
    content = log.read_bytes()
    return content[max((line.end() for line in _BEGIN.finditer(content)), default=0) :]


def shorten(log: Path) -> None:
    """Cuts the middle out of a log that has become too long. A log that cannot be cut stays as it is."""
    with suppress(OSError):  # a stage must not fail because of its log
        if log.stat().st_size > LIMIT:
            _cut(log)


def _cut(log: Path) -> None:
    """Writes the end over the middle before it truncates the file, so that nothing is lost on a full disk."""
    with log.open("r+b") as file:
        file.seek(-TAIL, os.SEEK_END)
        end = file.read(TAIL)
        read_to = file.tell()
        file.seek(HEAD)
        file.write(CUT + end[end.find(b"\n") + 1 :])  # whole lines, unless it is a single line
        write_to = file.tell()
        file.seek(read_to)
        meanwhile = file.read(TAIL)
        file.seek(write_to)
        file.write(meanwhile)
        file.flush()
        file.truncate()
