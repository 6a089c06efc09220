"""Data that another stage of the run makes: ``data.source: stage:NAME`` (docs/design/0031).

Such a source is a reference, so it orders stages and its fingerprint is that of the stage. The rows may not exist when
a run is planned; then one row of the form that the stage will make stands for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from alignment.config.data import DataConfig, SourceConfig
from alignment.config.faults import Fault
from alignment.config.stage import StageConfig
from alignment.core.artifacts import EVALUATION, ROWS
from alignment.core.errors import DataError
from alignment.data.formats import FORMATS, detect
from alignment.data.reading import Reader, prepared
from alignment.data.row_files import RawRow
from alignment.pipeline.plan import scorer_checks
from alignment.stages.base import DataSlot, MadeRows, Slot
from alignment.stages.registry import LEAVE_OUT, kind_of

DATA = "data"
"""The field of a stage's main data."""
_STAGE = "stage:"


def stage_named(source: str) -> str | None:
    """The stage that a source of data names, if it names one."""
    return source.removeprefix(_STAGE) if source.startswith(_STAGE) else None


def slots(stage: StageConfig) -> Iterator[Slot]:
    """A reference for each source of a stage that is another stage's rows."""
    for slot in _every_source(stage):
        if stage_named(slot.data.source) is not None:
            yield Slot(field=f"{slot.field}.source", takes=(ROWS,), ref=slot.data.source)


def data_slots(stage: StageConfig) -> Iterator[DataSlot]:
    """Every source that a stage reads, including those that are mixed in, with the checks of the stage's scorers. Call
    ``scorer_checks.faults`` first."""
    of_scorers = scorer_checks.row_checks(stage)
    for slot in _every_source(stage):
        own = slot.field.partition(".mix[")[0] == DATA
        yield replace(slot, checks=(*slot.checks, *of_scorers)) if own else slot


def _every_source(stage: StageConfig) -> Iterator[DataSlot]:
    for slot in kind_of(stage).data(stage):
        if slot.in_use:
            yield slot
            for number, part in enumerate(slot.data.mix if isinstance(slot.data, DataConfig) else ()):
                yield replace(slot, field=f"{slot.field}.mix[{number}]", data=part)


def faults(stages: Mapping[str, StageConfig]) -> Iterator[Fault]:
    """Stages that cannot use the rows of the stages that they name. Call all other checks first."""
    for name, stage in stages.items():
        for slot in data_slots(stage):
            made_by = stage_named(slot.data.source)
            maker = None if made_by is None else stages.get(made_by)
            rows = None if maker is None else kind_of(maker).rows(maker)
            if rows is not None and (problem := _problem(rows.example, slot)):
                where = f"stages.{name}.{slot.field}.source"
                message = f"'{slot.data.source}' makes rows like {rows.example}: {problem}; {_advice(rows, slot)}"
                yield Fault(where=where, message=message)


def _problem(row: str, slot: DataSlot) -> str:
    value, where = json.loads(row), slot.data.source
    try:
        form = FORMATS.get(slot.data.format or "") or detect(
            [prepared(value, slot.data)], where=where, mapped=slot.data.columns
        )
        reader = Reader(format=form, record=slot.record, data=slot.data)
        for record in reader.records(RawRow(value=value, where=where)):
            for check in (*slot.checks, *slot.skippable_checks):
                check(record)
    except DataError as error:
        return error.message
    return ""


def _advice(rows: MadeRows, slot: DataSlot) -> str:
    maker = slot.data.source.removeprefix(_STAGE)
    fitting = [setting for setting, row in rows.others.items() if not _problem(row, slot)]
    if not fitting:
        return "that stage cannot make suitable rows; name a file or another stage"
    return f"use {' or '.join(f'stages.{maker}.{setting}' for setting in fitting)}"


def with_left_out(stages: Mapping[str, StageConfig]) -> dict[str, StageConfig]:
    """The stages, where those that leave out prompts of the run's evaluations name these, unless they name others. An
    evaluation of rows that a stage makes is passed over: its prompts are not known beforehand."""
    evaluated: list[SourceConfig] = [
        part
        for stage in stages.values()
        if kind_of(stage).produces == EVALUATION
        for slot in kind_of(stage).data(stage)
        if slot.field == DATA and isinstance(slot.data, DataConfig)
        for part in (slot.data, *slot.data.mix)
        if part.source and stage_named(part.source) is None
    ]
    names = [setting.name for setting in fields(SourceConfig)]
    sources: list[DataConfig] = []
    for data in (DataConfig(**{name: getattr(part, name) for name in names}) for part in evaluated):
        sources += [] if data in sources else [data]
    completed: dict[str, Any] = dict(stages)
    for name, stage in completed.items():
        if not getattr(stage, LEAVE_OUT, True):
            completed[name] = replace(stage, **{LEAVE_OUT: sources})
    return completed
