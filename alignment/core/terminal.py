"""What is written to a terminal. Rows, answers, file names and errors hold what somebody else wrote, and a terminal
obeys some of it: an escape moves the cursor, hides a line or sets the title. Here it is shown instead."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

from alignment.core.errors import AlignmentError

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tab and line break, what turns the direction of text, and halves of characters."""


def visible(text: str) -> str:
    r"""The text with what a terminal would obey written out, such as ``\x1b``."""
    return _OBEYED.sub(lambda match: _written(ord(match[0])), text)


class Terminal(Console):
    """A console whose text is ``visible``; its own colours and cursor stay what they are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, **options)

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        """As rich renders it; what rich itself has the terminal do is no text."""
        for segment in super().render(*arguments, **options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def complain(error: AlignmentError) -> None:
    """An error, its kind first."""
    Terminal(stderr=True).print(error.labelled, markup=False, highlight=False, soft_wrap=True)


def _written(number: int) -> str:
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
