"""The settings of a data source in ``align doctor``: read from the command line, and written as a user types them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from alignment.config.data import SourceConfig
from alignment.config.faults import Fault, refuse
from alignment.config.typed import source_from_plain
from alignment.pipeline.plan.compose import tree_of

READ = ("split", "subset", "format", "columns", "placeholders")
"""Settings that say how rows are read."""
UNREAD = ("limit", "on_error", "max_skipped")
"""Settings that say which rows a stage uses; doctor examines all."""
EXAMPLE = "columns={prompt: my_question}"
_PLAIN = re.compile(r"(?!(?:true|false|null|nan|inf)$)[A-Za-z_][A-Za-z0-9_]*", re.IGNORECASE)
"""Texts that need no quotes in an override."""


def source_of(source: str, options: Mapping[str, str], overrides: Sequence[str]) -> SourceConfig:
    """The source that the command line describes; ``overrides`` are parsed and checked like those of a recipe.

    Raises:
        ConfigError: lists every fault.
    """
    given, faults = tree_of(overrides, example=EXAMPLE)
    faults += _unusable(given, options)
    data, wrong = source_from_plain({**given, **options}, where="DATA")
    refuse([*faults, *wrong])
    return replace(data, source=source)


def written(data: SourceConfig, prefix: str = "") -> list[str]:
    """``KEY=VALUE`` for each setting of how rows are read that is not at its default."""
    usual = SourceConfig()
    chosen = {name: getattr(data, name) for name in READ if getattr(data, name) != getattr(usual, name)}
    return [f"{prefix}{name}={_as_typed(value)}" for name, value in chosen.items()]


def _unusable(given: Mapping[str, Any], options: Mapping[str, str]) -> Iterator[Fault]:
    for name in given:
        if name == "source":
            yield Fault(where="DATA.source", message="DATA is the source already; leave this out")
        if name in UNREAD:
            yield Fault(where=f"DATA.{name}", message="has no effect; doctor examines every row; leave it out")
        if name in options:
            yield Fault(where=f"DATA.{name}", message=f"is also given as --{name}; give one")


def _as_typed(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_as_typed(item)}' for key, item in value.items())}}}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
