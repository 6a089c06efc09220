"""Parses each ``KEY=VALUE`` of the command line with Hydra, and accepts some that its grammar rejects.

Outside quotes, Hydra's grammar allows only ASCII letters, and the shell has removed the user's quotes: a folder called
``müller`` would need two pairs of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from alignment.config import yaml_file
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
_PATH = "path:"
_SHOWN_TEXT = 60
_SHOWN_OVERRIDE = 300
_DEEPEST = 30
"""Levels of nested brackets; Hydra and OmegaConf recurse into them, and Python limits recursion."""


def parse(overrides: Sequence[str], *, example: str = "stages.dpo.beta=0.3") -> tuple[list[Override], list[Fault]]:
    """The valid overrides, and the faults in the others, which show an ``example``."""
    parsed, faults = [], []
    for text in overrides:
        opened = itertools.accumulate({"[": 1, "{": 1, "]": -1, "}": -1}.get(letter, 0) for letter in text)
        if (depth := max(opened, default=0)) > _DEEPEST:
            message = f"brackets are nested {depth} deep; no setting needs more than a few levels"
            faults.append(Fault(where=f"{_shown(text)[:_SHOWN_TEXT]}…", message=message))
            continue
        try:
            override = parse_override(text)
        except (HydraException, yaml.YAMLError, ValueError):  # ValueError: a number of thousands of digits
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


def _shown(text: str) -> str:
    """The override, without a value that may hold a key or a password, as an address may."""
    key, _, _ = text.partition("=")
    if any(secret in text for secret in _SECRET):
        return f"{key}=…"
    return text if len(text) <= _SHOWN_OVERRIDE else f"{text[:_SHOWN_OVERRIDE]}…"


def _malformed(text: str, example: str) -> Fault:
    return Fault(where=_shown(text), message=f"not an override; write key=value, such as {example}")


def parse_override(text: str) -> Override:
    """Parses one override. Raises HydraException, or yaml.YAMLError: the text is not an override."""
    parser = OverridesParser.create()
    key, _, value = text.partition("=")
    is_file = value.startswith(_PATH) and "${" not in value and not ('"' in value and "'" in value)
    try:
        parsed = parser.parse_override(text)
    except HydraException:  # letters of other languages, and brackets or quotes in a file's name
        if not (is_file or not text.isascii()):
            raise
        parsed = parser.parse_override(f"{key}=0")
        parsed._value = value if is_file else yaml_file.load(value)
    else:
        if parsed.is_sweep_override() and is_file and f",{_PATH}" not in text:
            parsed = parser.parse_override(f"{key}=0")
            parsed._value = value  # commas in a file's name
    parsed.input_line = text
    return parsed
