"""One ``KEY=VALUE`` of the command line, as Hydra parses it, and what its grammar does not take but a user means.

Hydra's grammar knows ASCII letters only outside quotes, and a shell has taken the quotes away: a folder called
``müller`` would need two pairs of them.
"""

from __future__ import annotations

import re
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

_STAND_IN = re.compile(r"_x([0-9a-f]{6})x_")
_PATH = "path:"


def parse_override(text: str) -> Override:
    """The override.

    Raises:
        HydraException: it is none.
    """
    parser = OverridesParser.create()
    ascii_text = "".join(character if character.isascii() else f"_x{ord(character):06x}x_" for character in text)
    try:
        parsed = parser.parse_override(ascii_text)
    except HydraException:
        key, _, value = ascii_text.partition("=")
        if not value.startswith(_PATH) or "${" in value or ('"' in value and "'" in value):
            raise
        quote = '"' if "'" in value else "'"
        parsed = parser.parse_override(f"{key}={quote}{value}{quote}")  # brackets and quotes in a file's name
    return parsed if ascii_text == text and parsed.input_line == text else _restored(parsed, text)


def _restored(parsed: Override, text: str) -> Override:
    """The override with its own letters in place of those that stood in for them."""
    parsed.key_or_group = _own(parsed.key_or_group)
    parsed.package = _own(parsed.package)
    parsed._value = _own(parsed._value)
    parsed.input_line = text
    return parsed


def _own(value: Any) -> Any:
    if isinstance(value, str):
        return _STAND_IN.sub(lambda found: chr(int(found[1], 16)), value)
    if isinstance(value, QuotedString):
        return QuotedString(text=_own(value.text), quote=value.quote)
    if isinstance(value, list):
        return [_own(item) for item in value]
    return {_own(key): _own(item) for key, item in value.items()} if isinstance(value, dict) else value
