"""Finds what would make Hydra or OmegaConf run code, or read anything outside the configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from alignment.config.faults import Fault

_TOKEN = re.compile(r"\$\{|[{}:]")


def hostile(value: Any, *, where: str) -> Iterator[Fault]:
    """A fault for each such key and value in ``value``, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            path = f"{where}.{key}" if where else str(key)
            if str(key).split(".")[-1] == "_target_":
                yield Fault(
                    where=path, message="'_target_' is not allowed: a configuration contains data and never runs code"
                )
            if _has_resolver(str(key)):
                yield _reads_outside(str(key), where)
            yield from hostile(item, where=path)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from hostile(item, where=f"{where}[{number}]")
    elif isinstance(value, str) and _has_resolver(value):
        yield _reads_outside(value, where)


def _reads_outside(text: str, where: str) -> Fault:
    message = f"{text!r} is not allowed: a configuration can only refer to itself; use ${{other.key}} or the value"
    return Fault(where=where, message=message)


def _has_resolver(text: str) -> bool:
    """Whether the text may contain ``${name:…}``, even with an interpolated name: a colon inside such braces."""
    depth = 0
    for token in _TOKEN.findall(text):
        if token == ":" and depth:
            return True
        if token == "}":
            depth = max(0, depth - 1)
        elif token == "${" or (token == "{" and depth):
            depth += 1
    return False
