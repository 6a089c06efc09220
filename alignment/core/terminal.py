"""What a terminal shows: its width, streams, tables, and the end of a log."""

from __future__ import annotations

import io
import os
import re
import stat
import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, TextIO, cast

from rich.console import Console
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table

from alignment.core.errors import AlignmentError

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and line break, characters that change the direction of text, and surrogates."""


def visible(text: str) -> str:
    r"""The text with every character that a terminal would obey written out, such as ``\x1b``."""
    return _OBEYED.sub(lambda match: _written(ord(match[0])), text)


class Terminal(Console):
    """A console that makes text ``visible``; its own colours and cursor movements still work."""

    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, **options)

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        """Rich's segments with visible text; control segments are rich's own and stay."""
        for segment in super().render(*arguments, **options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def say(console: Console, *lines: str) -> None:
    """Prints lines as they are: nothing in them is markup, and none is wrapped."""
    for line in lines:
        console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)


def complain(error: AlignmentError) -> None:
    """Prints an error to standard error, with its kind first."""
    say(Terminal(stderr=True), error.labelled)


def _written(number: int) -> str:
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def make_unfailing() -> None:
    """Makes printing safe in this process, wherever its output goes. A process may have no output stream at all. A
    character that the terminal's encoding lacks is printed as its number."""
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is not None:
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, cast("TextIO", Unfailing(stream)))


class Unfailing:
    """A text stream that drops text that cannot be written. ``lost`` is True once it dropped any."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.lost = False

    def write(self, text: str) -> int:
        """Writes the text if it can; returns the number of characters either way."""
        try:
            self._stream.write(text)
        except OSError:
            self._give_up()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes the lines one after another."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes the buffer."""
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """Redirects the rest to the null device, unless it goes to a file: the interpreter flushes again at its end."""
        self.lost = True
        try:
            if stat.S_ISREG(os.fstat(self._stream.fileno()).st_mode):
                return
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):  # the stream has no file descriptor
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_WIDEST = 10_000


def grid() -> Table:
    """An empty table without lines and heads, whose first column is not wrapped."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=10)
    return table


def print_whole(console: Console, table: Table) -> None:
    """Prints a table whose figures are not cut, however narrow the terminal: a long line is better."""
    width = console.width
    console.width = max(width, Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum)
    try:
        console.print(table, crop=False, soft_wrap=True)
    finally:
        console.width = width


LIMIT = 16 << 20
"""Size in bytes above which the middle of a log is removed."""
HEAD, TAIL = 1 << 20, 4 << 20
"""Bytes of the beginning and of the end that stay."""
_BEGIN = re.compile(rb"^=== \d{4}-\d\d-\d\dT\S+  .+ ===$", re.MULTILINE)
"""The line of ``begin_attempt``."""
CUT = b"\n[... the middle of this log was left out: it was longer than it may be ...]\n"


def begin_attempt(log: Path, attempt: str) -> None:
    """Appends a line that says which attempt writes what follows; a log that cannot be written stays as it is. Example:
    ``=== 2026-11-29T03:22:59+00:00 attempt 2 at dpo-91c0aa17 ===``."""
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
