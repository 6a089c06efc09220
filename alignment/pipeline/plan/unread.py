"""Settings of adapters and long rows that have no effect together with the others.

A setting at its default is always accepted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields

from alignment.config.data import TooLong, TooLongConfig
from alignment.config.faults import Fault, unread_notes
from alignment.config.model import LOW_RANK, READ_BY, AdapterConfig
from alignment.config.run import RunConfig
from alignment.config.stage import StageConfig
from alignment.report.kit import text
from alignment.stages.registry import as_trained, kind_of


def faults(config: RunConfig) -> list[Fault]:
    """A fault for every setting in a run that has no effect."""
    return [fault for name, stage in config.stages.items() for fault in _stage_faults(stage, f"stages.{name}")]


def sentences(settings: Iterable[Fault]) -> Iterator[str]:
    """A sentence for the settings without effect that the same reader would use."""
    names_of: dict[str, dict[str, None]] = {}
    for setting in settings:
        names_of.setdefault(setting.reader, {})[setting.where] = None
    for reader, names in names_of.items():
        have, them = ("has", "it") if len(names) == 1 else ("have", "them")
        yield f"{text.listing(list(names))} {have} no effect: {reader} uses {them}"


def _stage_faults(stage: StageConfig, where: str) -> Iterator[Fault]:
    trained = as_trained(stage)
    if trained is not None:
        yield from _adapter_faults(trained.adapter, f"{where}.adapter")
        drops = trained.adapter.kind in LOW_RANK and trained.adapter.dropout > 0.0
        if drops and not kind_of(stage).learning.may_drop:
            message = (
                f"{trained.adapter.dropout:g} is not supported: {stage.kind} compares forward passes of one model, "
                f"and dropout would change them; use 0"
            )
            yield Fault(where=f"{where}.adapter.dropout", message=message)
    too_long = getattr(stage, "too_long", None)
    if isinstance(too_long, TooLongConfig) and too_long.do is not TooLong.cut:
        yield from unread_notes(too_long, TooLongConfig(), ("side",), f"{where}.too_long", "only too_long.do 'cut'")


def _adapter_faults(adapter: AdapterConfig, where: str) -> Iterator[Fault]:
    for field in fields(adapter):
        readers = READ_BY.get(field.name)
        if readers is not None and adapter.kind not in readers:
            kinds = ", ".join(f"'{kind.value}'" for kind in readers)
            reader = f"only adapter.kind {kinds}, not '{adapter.kind.value}',"
            yield from unread_notes(adapter, AdapterConfig(), (field.name,), where, reader)
