"""Output streams whose reader may disappear: a closed pipe or terminal, or a full disk behind a log.

A command must not depend on whether anybody reads its output, so such a stream discards it. A disk may have space
again later: a file loses only the text that could not be written.
"""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Iterable
from typing import IO, Any, TextIO, cast


def make_unfailing() -> None:
    """Makes printing safe in this process, wherever its output goes. A process may have no output stream at all.

    A character that the terminal's encoding lacks is printed as its number.
    """
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
