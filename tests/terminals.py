"""What a terminal shows after a program has written to it."""

from __future__ import annotations

import pytest

pyte = pytest.importorskip("pyte", reason="a terminal is imitated by pyte, which is not installed")


class Terminal:
    """A terminal of so many columns and lines, with what has left it at the top."""

    def __init__(self, columns: int, lines: int = 24, *, translates: bool = False) -> None:
        self._screen = pyte.HistoryScreen(columns, lines, history=1000, ratio=0.5)
        self._stream = pyte.ByteStream(self._screen)
        if translates:  # as the driver of a real terminal makes of a line break
            self._screen.set_mode(pyte.modes.LNM)

    def feed(self, content: bytes) -> None:
        """The program writes."""
        self._stream.feed(content)

    def resize(self, columns: int, lines: int = 24) -> None:
        """The user changes its size; lines are not wrapped again."""
        self._screen.resize(lines, columns)

    @property
    def lines(self) -> list[str]:
        """Its lines without the empty ones at the end, and without spaces at their ends."""
        shown = [line.rstrip() for line in self._screen.display]
        while shown and not shown[-1]:
            shown.pop()
        return shown

    @property
    def shows_cursor(self) -> bool:
        """Whether the cursor is visible."""
        return not self._screen.cursor.hidden

    @property
    def cursor(self) -> tuple[int, int]:
        """Column and line of the cursor."""
        return self._screen.cursor.x, self._screen.cursor.y
