"""The settings of a data source in ``align doctor``, read from the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from alignment.config.data import SourceConfig
from alignment.config.faults import Fault, refuse
from alignment.config.typed import source_from_plain
from alignment.pipeline.plan.compose import tree_of

UNREAD = ("limit", "on_error", "max_skipped")
"""Settings that say which rows a stage uses; doctor examines all."""
AGAINST = "--against"
"""The option that names the source to compare with."""
EXAMPLE = "columns={prompt: my_question}"


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


def against_of(source: str | None, *, split: str | None, subset: str | None) -> SourceConfig | None:
    """The source to compare with; None if there is none.

    Raises:
        ConfigError: a split or subset is chosen of no source.
    """
    if source is not None:
        return SourceConfig(source=source, split=split or SourceConfig().split, subset=subset or None)
    chosen = [name for name, value in (("split", split), ("subset", subset)) if value]
    refuse([Fault(where=f"{AGAINST}-{name}", message=f"has no effect without {AGAINST}") for name in chosen])
    return None


def _unusable(given: Mapping[str, Any], options: Mapping[str, str]) -> Iterator[Fault]:
    for name in given:
        if name == "source":
            yield Fault(where="DATA.source", message="DATA is the source already; leave this out")
        if name in UNREAD:
            yield Fault(where=f"DATA.{name}", message="has no effect; doctor examines every row; leave it out")
        if name in options:
            yield Fault(where=f"DATA.{name}", message=f"is also given as --{name}; give one")
