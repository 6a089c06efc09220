"""Parses each ``KEY=VALUE`` of the command line with Hydra, and accepts some that its grammar rejects.

Outside quotes, Hydra's grammar allows only ASCII letters, and the shell has removed the user's quotes: a folder called
``müller`` would need two pairs of them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from alignment.config.faults import Fault
from alignment.pipeline.plan.hydra_files import hostile


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is not a group, with its dotted key."""
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def without(tree: Any, paths: Collection[str], at: str = "") -> Any:
    """The tree, which stands ``at`` a path, without the values at these paths, such as
    ``stages.evaluate.metrics[0].passing_score``."""
    if isinstance(tree, Mapping):
        keys = {key: f"{at}.{key}".removeprefix(".") for key in tree}
        return {key: without(tree[key], paths, path) for key, path in keys.items() if path not in paths}
    if isinstance(tree, (list, tuple)):
        return [without(item, paths, f"{at}[{number}]") for number, item in enumerate(tree)]
    return tree


def nested(keys: Sequence[str], value: Any) -> Any:
    """The value inside a group for each of the keys."""
    for key in reversed(keys):
        value = {key: value}
    return value


_SECRET = ("api_key_env", "base_url", "://")
"""Addresses, and settings whose values are not repeated, alone or inside a group: people put keys there by mistake."""
_STAND_IN = re.compile(r"_x([0-9a-f]{6})x_")
_PATH = "path:"
_SHOWN_TEXT = 60
_SHOWN_OVERRIDE = 300
_DEEPEST = 30
"""Levels of nested brackets; Hydra and OmegaConf recurse into them, and Python limits recursion."""


def parse(overrides: Sequence[str], *, example: str = "stages.dpo.beta=0.3") -> tuple[list[Override], list[Fault]]:
    """The valid overrides, and the faults in the others, which show an ``example``."""
    parsed, faults = [], []
    for text in overrides:
        if (depth := _depth(text)) > _DEEPEST:
            message = f"brackets are nested {depth} deep; no setting needs more than a few levels"
            faults.append(Fault(where=f"{_shown(text)[:_SHOWN_TEXT]}…", message=message))
            continue
        try:
            override = parse_override(text)
        except (HydraException, ValueError):  # ValueError: a number of thousands of digits
            faults.append(_malformed(text, example))
            continue
        outside = list(hostile({override.key_or_group: text}, where=""))
        if not override.key_or_group:
            faults.append(_malformed(text, example))
        elif outside:
            faults.extend(outside)
        elif override.is_sweep_override():
            faults.append(Fault(where=_shown(text), message="several values for one key; give one"))
        elif override.key_or_group.split(".")[0].split("/")[0] == "hydra":
            faults.append(Fault(where=text, message="Hydra's own settings are not allowed"))
        else:
            parsed.append(override)
    return parsed, faults


def _depth(text: str) -> int:
    opened = itertools.accumulate({"[": 1, "{": 1, "]": -1, "}": -1}.get(letter, 0) for letter in text)
    return max(opened, default=0)


def _shown(text: str) -> str:
    """The override, without a value that may hold a key or a password, as an address may."""
    key, _, _ = text.partition("=")
    if any(secret in text for secret in _SECRET):
        return f"{key}=…"
    return text if len(text) <= _SHOWN_OVERRIDE else f"{text[:_SHOWN_OVERRIDE]}…"


def _malformed(text: str, example: str) -> Fault:
    return Fault(where=_shown(text), message=f"not an override; write key=value, such as {example}")


def parse_override(text: str) -> Override:
    """Parses one override. Raises HydraException: the text is not an override."""
    parser = OverridesParser.create()
    ascii_text = "".join(character if character.isascii() else f"_x{ord(character):06x}x_" for character in text)
    try:
        parsed = parser.parse_override(ascii_text)
    except HydraException:
        if not _names_file(ascii_text):
            raise
        parsed = parser.parse_override(_quoted(ascii_text))  # brackets and quotes in a file's name
    else:
        if parsed.is_sweep_override() and _names_file(ascii_text) and f",{_PATH}" not in ascii_text:
            parsed = parser.parse_override(_quoted(ascii_text))  # commas
    return parsed if ascii_text == text and parsed.input_line == text else _restored(parsed, text)


def _names_file(text: str) -> bool:
    """Whether the value of an override is a path that quotes can enclose."""
    value = text.partition("=")[2]
    return value.startswith(_PATH) and "${" not in value and not ('"' in value and "'" in value)


def _quoted(text: str) -> str:
    key, _, value = text.partition("=")
    quote = '"' if "'" in value else "'"
    return f"{key}={quote}{value}{quote}"


def _restored(parsed: Override, text: str) -> Override:
    parsed.key_or_group = _decoded(parsed.key_or_group)
    parsed.package = _decoded(parsed.package)
    parsed._value = _decoded(parsed._value)
    parsed.input_line = text
    return parsed


def _decoded(value: Any) -> Any:
    if isinstance(value, str):
        return _STAND_IN.sub(lambda match: chr(int(match[1], 16)), value)
    if isinstance(value, QuotedString):
        return QuotedString(text=_decoded(value.text), quote=value.quote)
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return {_decoded(key): _decoded(item) for key, item in value.items()} if isinstance(value, dict) else value
