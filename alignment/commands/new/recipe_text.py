"""A recipe as text: each value with the comment that says why it is this one."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from alignment.config.new_recipe import Reasoned
from alignment.core.terminal import visible

_WIDTH = 120
_INDENT = 2
_SMALL = 1e-2
"""Smaller numbers are written with an exponent."""


def group_lines(settings: Mapping[str, Any], *, depth: int) -> Iterator[str]:
    """Lines of a group of settings; each is plain, a group of further ones, or ``Reasoned``."""
    pad = " " * _INDENT * depth
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield f"{pad}{flow(key)}:"
            yield from group_lines(value, depth=depth + 1)
        elif isinstance(value, Reasoned):
            yield from _with_reason(f"{pad}{flow(key)}: {flow(value.value)}", value.why, pad)
        else:
            yield f"{pad}{flow(key)}: {flow(value)}"


def comment_lines(text: str, *, pad: str = "") -> list[str]:
    """A comment, wrapped; nothing in the text can end it."""
    one_line = " ".join(visible(text).split())
    return [f"{pad}# {line}" for line in textwrap.wrap(one_line, _WIDTH - len(pad) - 2, break_on_hyphens=False)]


def flow(value: Any) -> str:
    """A value on one line."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=float("inf"), sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("...").removesuffix("\n")


def _with_reason(line: str, why: str, pad: str) -> list[str]:
    """The reason behind the line, or above it if the two together are too long."""
    comment = comment_lines(why, pad=pad)
    behind = f"{line}  {comment[0].strip()}" if len(comment) == 1 else ""
    return [behind] if behind and len(behind) <= _WIDTH else [*comment, line]


class _Dumper(yaml.SafeDumper):
    """Writes rates as people do, 2e-4."""


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    if not 0 < abs(value) < _SMALL:
        return dumper.represent_float(value)
    digits, _, exponent = f"{value:.6e}".partition("e")
    mantissa = digits.rstrip("0").rstrip(".")
    # YAML 1.1 has no number of this form; OmegaConf, which reads recipes, does.
    return dumper.represent_scalar("tag:yaml.org,2002:str", f"{mantissa}e{int(exponent)}")


_Dumper.add_representer(float, _float)
