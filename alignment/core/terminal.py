"""Safe output to a terminal.

Rows, answers, file names and errors hold text that somebody else wrote. A terminal obeys escapes in it: they move the
cursor, hide a line or set the title. This console displays them instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

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


def complain(error: AlignmentError) -> None:
    """Prints an error to standard error, with its kind first."""
    Terminal(stderr=True).print(error.labelled, markup=False, highlight=False, soft_wrap=True)


def _written(number: int) -> str:
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
