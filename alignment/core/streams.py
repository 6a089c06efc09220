"""Output streams whose other end may go away: a closed pipe or terminal, or a full disk behind a log.

What a command does never depends on whether anybody still reads what it prints, so such a stream falls silent.
A disk may have room again: of a file, only what it did not take is lost.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable
from typing import IO, Any, TextIO, cast


def make_unfailing() -> None:
    """Lets this process print wherever its output leads; a process without any has nothing to print to anyway."""
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is not None:
            setattr(sys, name, cast("TextIO", Unfailing(stream)))


class Unfailing:
    """A text stream that drops what cannot be written. ``lost`` says whether anything was."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.lost = False

    def write(self, text: str) -> int:
        """Characters taken, written or not."""
        try:
            self._stream.write(text)
        except OSError:
            self._give_up()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """One after another."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hands on what is buffered."""
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """Sends the rest nowhere, unless to a file: the interpreter flushes the stream once more when it ends."""
        self.lost = True
        try:
            if stat.S_ISREG(os.fstat(self._stream.fileno()).st_mode):
                return
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):  # no file behind it
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
