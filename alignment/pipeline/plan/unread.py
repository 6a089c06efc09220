"""Settings that nothing reads beside the others, or that leave nothing to learn: they would promise something, and
change a fingerprint for nothing.

A setting at its default promises nothing and is let pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from alignment.config.adapter import LOW_RANK, READ_BY, AdapterConfig
from alignment.config.faults import Fault, unread_faults
from alignment.config.run import RunConfig
from alignment.config.stage import StageConfig
from alignment.config.too_long import TooLong, TooLongConfig
from alignment.stages.registry import as_trained, kind_of


def faults(config: RunConfig) -> list[Fault]:
    """Everything in a run that is set and read by nothing."""
    return [fault for name, stage in config.stages.items() for fault in _stage_faults(stage, f"stages.{name}")]


def _stage_faults(stage: StageConfig, where: str) -> Iterator[Fault]:
    trained = as_trained(stage)
    if trained is not None:
        yield from _adapter_faults(trained.adapter, f"{where}.adapter")
        drops = trained.adapter.kind in LOW_RANK and trained.adapter.dropout > 0.0
        if drops and not kind_of(stage).learning.may_drop:
            message = (
                f"{trained.adapter.dropout:g} is read by nothing: {stage.kind} compares passes of one model, of which "
                "none may drop anything; take 0"
            )
            yield Fault(where=f"{where}.adapter.dropout", message=message)
    too_long = getattr(stage, "too_long", None)
    if isinstance(too_long, TooLongConfig) and too_long.do is not TooLong.cut:
        yield from unread_faults(too_long, TooLongConfig(), ("side",), f"{where}.too_long", "only too_long.do 'cut'")


def _adapter_faults(adapter: AdapterConfig, where: str) -> Iterator[Fault]:
    for field in fields(adapter):
        readers = READ_BY.get(field.name)
        if readers is not None and adapter.kind not in readers:
            kinds = ", ".join(f"'{kind.value}'" for kind in readers)
            reader = f"only adapter.kind {kinds}, and it is '{adapter.kind.value}',"
            yield from unread_faults(adapter, AdapterConfig(), (field.name,), where, reader)
