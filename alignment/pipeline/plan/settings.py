"""Checks that a rule for a single field cannot make: settings that are wrong together, or on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path

from alignment.config.data import DataConfig, SourceConfig, TooLong, TooLongConfig, ValidationConfig
from alignment.config.faults import Fault, suggestion, unread_faults, unread_notes
from alignment.config.launch import LaunchConfig, Offload, Sharding
from alignment.config.model import LOW_RANK, READ_BY, AdapterConfig, AdapterKind, Dtype, ModelConfig
from alignment.config.optim import Moments
from alignment.config.run import RunConfig
from alignment.config.stage import StageConfig, TrainedConfig
from alignment.core.errors import DataError
from alignment.data.chat_template import CHATML, template_text
from alignment.data.formats import COLUMNS, FORMATS
from alignment.data.templates import name_faults, own_template, value_faults
from alignment.pipeline.backends import slurm
from alignment.pipeline.plan import chain_checks, made_rows, scorer_checks, tracking_checks
from alignment.report.kit import text
from alignment.stages.base import Refusal
from alignment.stages.registry import as_trained, kind_of

_NO_ROWS = (
    "missing; name the rows: path:FILE, hub:ORG/NAME@REVISION, bundled:NAME for data that ships with the project, "
    "or stage:NAME for rows that another stage makes"
)


def faults(config: RunConfig) -> list[Fault]:
    """Faults in a run's template, Slurm jobs, trackers, adapters and data, and those that its stages report; settings
    that have no effect beside the others; and stages, adapters and launches that do not work together."""
    every_fault: list[Fault] = [*_template_faults(config.model), *_slurm_faults(config.launch)]
    every_fault += tracking_checks.faults(config.tracking)
    for name, stage in config.stages.items():
        where, kind, trained = f"stages.{name}", kind_of(stage), as_trained(stage)
        if trained is not None:
            every_fault += _master_faults(trained, config.model.dtype, where)
            every_fault += chain_checks.faults(trained, config, f"{where}.adapter")
        read_by_code = bool(scorer_checks.functions(stage))
        for slot in kind.data(stage):
            if slot.in_use and not slot.data.source:
                every_fault.append(Fault(where=f"{where}.{slot.field}.source", message=_NO_ROWS))
            if isinstance(slot.data, DataConfig) and (slot.in_use or slot.data.source):
                any_column = read_by_code and slot.field == "data"  # which a function of the user's reads
                every_fault += _data_faults(slot.data, f"{where}.{slot.field}", any_column=any_column)
        if isinstance(validation := getattr(stage, "validation", None), ValidationConfig):
            every_fault += _validation_faults(validation, f"{where}.validation")
        every_fault += kind.faults(stage, config, where)
    every_fault += [fault for name, stage in config.stages.items() for fault in _unread_faults(stage, f"stages.{name}")]
    return [*every_fault, *combination_faults(config)]


def completed(config: RunConfig) -> RunConfig:
    """The run with the settings filled in that a stage takes from other stages."""
    stages = {name: kind_of(stage).completed(stage, config) for name, stage in config.stages.items()}
    return replace(config, stages=made_rows.with_left_out(stages))


def _template_faults(model: ModelConfig) -> Iterator[Fault]:
    yield from value_faults(model.template_options)
    try:
        if model.chat_template is not None:
            written = template_text(model.chat_template)
            yield from name_faults("" if written == CHATML else written, model.template_options)
    except DataError as error:
        yield Fault(where=error.where or "model.chat_template", message=f"{error.message}; {error.remedy}")


def option_faults(model: ModelConfig, folder: Path | None) -> Iterator[Fault]:
    """Options that the template in the base's ``folder`` does not read; none if the folder is not on this machine."""
    stored = None if model.chat_template is not None or folder is None else own_template(folder)
    if stored is None:
        return
    try:
        yield from name_faults(stored, model.template_options)
    except DataError as error:
        yield Fault(where="model.template_options", message=f"{error.message}; {error.remedy}")


def _slurm_faults(launch: LaunchConfig) -> Iterator[Fault]:
    submitted = slurm.submission(launch)
    if submitted is None:
        return
    if submitted.signal_seconds <= launch.grace_seconds:
        needed = f"a stage may need {launch.grace_seconds} seconds to save (launch.grace_seconds)"
        message = f"a job is asked to save {submitted.signal_seconds} seconds before its end, but {needed}; use more"
        yield Fault(where="launch.backend.signal_seconds", message=message)
    if submitted.time is not None and _seconds(submitted.time) <= submitted.signal_seconds:
        message = f"{submitted.time!r} is not longer than signal_seconds, so a job has no time to train; use more"
        yield Fault(where="launch.backend.time", message=message)
    if 0 < submitted.gpus < launch.num_processes:
        message = f"{submitted.gpus} for {launch.num_processes} processes; use one for each: {launch.num_processes}"
        yield Fault(where="launch.backend.gpus", message=message)
    if not (submitted.gpus or launch.num_processes):
        message = "0, and launch.num_processes is 0 (one for each GPU), so a job's number of GPUs is unknown; set this"
        yield Fault(where="launch.backend.gpus", message=message)


def _seconds(time: str) -> int:
    days, _, clock = time.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _master_faults(stage: TrainedConfig, dtype: Dtype, path: str) -> Iterator[Fault]:
    adapter, where = stage.adapter, f"{path}.adapter"
    if adapter.trains_modules and dtype is Dtype.bfloat16 and stage.optim.moments is not Moments.full:
        needs = f"{stage.optim.moments.value!r} needs float32 weights"
        message = f"{needs}, but adapter.modules_to_save are trained in bfloat16; use full, or model.dtype: float32"
        yield Fault(where=f"{path}.optim.moments", message=message)
    if adapter.master_weights:
        return
    if stage.optim.moments is not Moments.full:
        message = f"{stage.optim.moments.value!r} needs float32 weights; use full, or master_weights: true"
        yield Fault(where=f"{path}.optim.moments", message=message)
    if adapter.kind is not AdapterKind.full:
        yield from unread_notes(adapter, AdapterConfig(), ("master_weights",), where, "only adapter.kind 'full'")
    elif dtype is Dtype.float32:
        yield from unread_notes(adapter, AdapterConfig(), ("master_weights",), where, "only model.dtype 'bfloat16'")


def _validation_faults(validation: ValidationConfig, where: str) -> Iterator[Fault]:
    share, source = validation.share, validation.data.source
    if share is not None and source:
        message = f"{share:g} of the stage's own prompts, but {where}.data also names validation rows; remove one"
        yield Fault(where=f"{where}.share", message=message)
    if validation.on and share is None and not source:
        message = f"{validation.every}, but there are no held-out rows; set {where}.share=0.05, or {where}.data.source"
        yield Fault(where=f"{where}.every", message=message)
    settings = [field.name for field in fields(DataConfig)]
    if validation.on and share is not None and not source:
        settings.remove("source")
        yield from unread_notes(validation.data, DataConfig(), settings, f"{where}.data", f"only {where}.data.source")
    if not validation.on:
        reader, usual = f"only validation ({where}.every above 0)", ValidationConfig()
        yield from unread_notes(validation, usual, ("share",), where, reader)
        yield from unread_notes(validation.data, usual.data, settings, f"{where}.data", reader)
        yield from unread_faults(validation, usual, ("keep_best", "patience"), where, reader)


def source_faults(data: SourceConfig, where: str) -> Iterator[Fault]:
    """Faults in the settings of a single source."""
    if data.format is not None and data.format not in FORMATS:
        message = f"{data.format!r} is not a format; {suggestion(data.format, FORMATS)}"
        yield Fault(where=f"{where}.format".lstrip("."), message=message)
    for name in ("split", "subset") if not data.source.startswith("hub:") else ():
        if (value := getattr(data, name)) != getattr(SourceConfig(), name):
            message = f"{value!r} has no effect; only a hub's data set has a {name}"
            yield Fault(where=f"{where}.{name}".lstrip("."), message=message)


def column_faults(data: SourceConfig, where: str) -> Iterator[Fault]:
    """Faults in the names of columns that a source maps; none of them is a column of the file."""
    for column in data.columns:
        if column not in COLUMNS:
            message = f"no format has a column of this name; {suggestion(column, COLUMNS)}"
            yield Fault(where=f"{where}.columns.{column}".lstrip("."), message=message)


def _data_faults(data: DataConfig, where: str, *, any_column: bool) -> Iterator[Fault]:
    parts = {f"{where}.mix[{number}]": part for number, part in enumerate(data.mix)}
    for path, source in {where: data, **parts}.items():
        yield from source_faults(source, path)
        yield from () if any_column else column_faults(source, path)
    for path, part in parts.items():
        if part.share is not None and part.count is not None:
            yield Fault(where=path, message="set share or count, not both; without either, all rows are mixed in")
    if (shares := sum(part.share or 0.0 for part in data.mix)) >= 1.0:
        message = f"the shares add up to {shares:g}, which leaves no room for the stage's own rows"
        yield Fault(where=f"{where}.mix", message=message)


def unread_sentences(unread: Iterable[Fault]) -> Iterator[str]:
    """A sentence for the settings without effect that the same reader would use."""
    names_of: dict[str, dict[str, None]] = {}
    for setting in unread:
        names_of.setdefault(setting.reader, {})[setting.where] = None
    for reader, names in names_of.items():
        have, them = ("has", "it") if len(names) == 1 else ("have", "them")
        yield f"{text.listing(list(names))} {have} no effect: {reader} uses {them}"


def _unread_faults(stage: StageConfig, where: str) -> Iterator[Fault]:
    trained = as_trained(stage)
    if trained is not None:
        yield from _adapter_faults(trained.adapter, f"{where}.adapter")
        drops = trained.adapter.kind in LOW_RANK and trained.adapter.dropout > 0.0
        if drops and not kind_of(stage).learning.may_drop:
            why = f"{stage.kind} compares forward passes of one model, and dropout would change them"
            message = f"{trained.adapter.dropout:g} is not supported: {why}; use 0"
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


def combination_faults(config: RunConfig) -> Iterator[Fault]:
    """Stages, adapters and launches that do not work together. ``make matrix`` (tests/matrix) writes the table of
    tested combinations, docs/compatibility.md."""
    launch = config.launch
    yield from _launch_faults(launch)
    named = "any launch" if launch.sharding is Sharding.none else f"launch={launch.sharding.value}"
    for name, stage in config.stages.items():
        refusals = [*kind_of(stage).launch.refusals(stage, launch)]
        trained = as_trained(stage)
        refusals += [] if trained is None else _adapter_refusals(trained, launch, config.model.dtype)
        for refusal in refusals:
            message = f"does not work with {named}: {refusal.why}; use {refusal.instead}"
            yield Fault(where=f"stages.{name}.{refusal.field}", message=message)


def _launch_faults(launch: LaunchConfig) -> Iterator[Fault]:
    if launch.offload is Offload.optimizer and not launch.sharding.by_deepspeed:
        reader = "for the optimizer, only launch.sharding 'zero1', 'zero2' or 'zero3'"
        yield from unread_notes(launch, LaunchConfig(), ("offload",), "launch", reader)
    if launch.offload is Offload.weights and not launch.sharding.of_weights:
        reader = "for weights, only launch.sharding 'zero3' or 'fsdp'"
        yield from unread_notes(launch, LaunchConfig(), ("offload",), "launch", reader)
    rank, machines = launch.backend.machine_rank, launch.backend.num_machines
    if rank >= machines:
        message = f"{rank} is not a valid rank for {machines} machines; ranks start at 0"
        yield Fault(where="launch.backend.machine_rank", message=message)
    if rank and getattr(launch.backend, "submit", False):
        message = f"{rank}, but Slurm assigns ranks to machines; leave it out"
        yield Fault(where="launch.backend.machine_rank", message=message)


def _adapter_refusals(stage: TrainedConfig, launch: LaunchConfig, dtype: Dtype) -> Iterator[Refusal]:
    rounding = "stochastic rounding would depend on how the weights are sharded"
    if launch.sharding is not Sharding.none and not stage.adapter.master_weights:
        instead = "adapter=full: the master weights are sharded too"
        yield Refusal(field="adapter.master_weights", why=rounding, instead=instead)
    if launch.sharding is not Sharding.none and stage.adapter.trains_modules and dtype is Dtype.bfloat16:
        instead = "model.dtype=float32, in which nothing is rounded, or adapter=full"
        yield Refusal(field="adapter.modules_to_save", why=rounding, instead=instead)
    if launch.sharding is not Sharding.none and stage.optim.moments is not Moments.full:
        why = "eight-bit moments are stored in blocks, which sharding would split"
        yield Refusal(field="optim.moments", why=why, instead="optim.moments=full: they are sharded")
