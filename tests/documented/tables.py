"""Tables of settings, of the choices of a setting, and of options; a comment before each says whose they are::

    <!-- settings: stages.kto -->    a stage's, by its kind; `sweep` and `of a run` are the other two
    <!-- settings: all of sweep -->  and the table has every one
    <!-- settings: align judge -->   options of a verb

A first column headed by the name of a setting has that setting's choices. A default stands in a column ``default``, in
parentheses behind the meaning, in the order of the settings (``(16, 32, 0)``), or before ``, the default``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from alignment.config.run import GROUPS
from tests.documented.blocks import Table
from tests.documented.setting_paths import choices, defaults, ending_in, options_of

HEADS = ("setting", "setting of a stage", "key", "option")
ALL = "all of "
OF_A_RUN = "of a run"
_CODE = re.compile(r"`([^`]+)`")
_LITERAL = re.compile(r"`([^`]+)`|(-?[\d,]*\.?\d+)|(true|false|null|none|–)", re.IGNORECASE)


def faults(table: Table) -> Iterator[str]:
    assert table.settings is not None
    if table.settings.startswith("align "):
        yield from _option_faults(table, table.settings.removeprefix("align "))
    elif table.head[0] in HEADS or table.head[0].endswith(".`"):
        inner = table.head[0].strip("`") if table.head[0].endswith(".`") else ""
        prefix = _prefix(table.settings.removeprefix(ALL)) + inner
        for row in table.rows:
            yield from _row_faults(table, row, prefix)
        if table.settings.startswith(ALL):
            yield from _lacking(table, prefix)
    else:
        yield from _choice_faults(table, _prefix(table.settings) + table.head[0].strip("`"))


def _prefix(settings: str) -> str:
    return "" if settings == OF_A_RUN else f"{settings}."


def _lacking(table: Table, prefix: str) -> Iterator[str]:
    below = {path.removeprefix(prefix) for path in defaults() if path.startswith(prefix)}
    shown = {name for row in table.rows for name in _CODE.findall(row[0])}
    yield from (f"the table lacks {prefix}{name}" for name in sorted(below - shown) if "." not in name)


def _option_faults(table: Table, verb: str) -> Iterator[str]:
    for row in table.rows:
        for option in re.findall(r"--[a-z][\w-]*", row[0]):
            if option not in options_of(verb):
                yield f"align {verb} has no {option}"


def _row_faults(table: Table, row: list[str], prefix: str) -> Iterator[str]:
    paths: list[str] = []
    for name in _CODE.findall(row[0]):
        key = name.partition("=")[0]
        if "=" in name and key in GROUPS:
            continue
        beside = paths[-1].rpartition(".")[0] if paths else ""
        path = next((path for path in (f"{prefix}{key}", f"{beside}.{key}") if path in defaults()), None)
        if path is None:
            yield f"no setting {prefix}{key}"
        else:
            paths.append(path)
    for path, literal in zip(paths, _quoted_defaults(table, row), strict=False):
        if not any(_is(default, literal) for default in defaults()[path]):
            yield f"{path} has the default {defaults()[path][0]}, not {literal}"


def _quoted_defaults(table: Table, row: list[str]) -> list[str]:
    """The defaults that a row quotes, in the order of its settings."""
    if "default" in table.head:
        return _literals(row[table.head.index("default")])
    meaning = row[1]
    if before := re.search(r"(\S+)(?:, the default\b| \((?:the )?default\))", meaning):
        return _literals(before[1].lstrip("("))
    return [literal for text in re.findall(r"\(([^()]*)\)", meaning) for literal in _literals(text)]


def _literals(text: str) -> list[str]:
    """The literals that a list begins with; only the first must stand alone."""
    literals: list[str] = []
    for part in re.split(r"[,;:] ", text):
        match = _LITERAL.match(part)
        if match is None or (not literals and match.end() != len(part)):
            break
        literals.append(next(group for group in match.groups() if group is not None))
    return literals


def _is(default: Any, literal: str) -> bool:
    if isinstance(default, list) and len(default) == 1:
        (default,) = default
    if default is None or default is False or default is True:
        words = {None: ("null", "none", "–"), False: ("false",), True: ("true",)}[default]
        return literal.lower() in words
    if isinstance(default, int | float):
        try:
            return float(literal.replace(",", "")) == float(default)
        except ValueError:
            return False
    return str(default) == literal


def default_faults(line: str) -> Iterator[str]:
    """Defaults that a line of prose quotes behind a setting, as in ```launch.hang_seconds` (600)``, and that are none
    of any setting of that name."""
    for key, inside in re.findall(r"`([a-z_][\w.]*)` \(([^()]*)\)", line):
        literals = _literals(inside.removesuffix(" by default"))
        known = [default for path in ending_in(key) for default in defaults()[path]]
        if known and literals and not any(_is(default, literals[0]) for default in known):
            yield f"{key} has the default {known[0]}, not {literals[0]}"


def _choice_faults(table: Table, path: str) -> Iterator[str]:
    """Every choice has a row, every row a choice, and the one called default is it."""
    if path not in choices():
        yield f"{path} has no fixed choices"
        return
    shown = []
    for row in table.rows:
        name = _CODE.findall(row[0])[0]
        shown.append(name)
        if name not in choices()[path]:
            yield f"{path} cannot be {name}"
        if re.search(r"\((?:the )?default\)", " ".join(row)) and not _is(defaults()[path][0], name):
            yield f"{path} is {defaults()[path][0]} by default, not {name}"
    yield from (f"the table lacks {name}" for name in choices()[path] if name not in shown)
