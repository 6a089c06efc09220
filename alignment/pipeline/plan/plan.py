"""Turns a composed run into a plan: which stages run, which are reused, and why. Starts and downloads nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alignment.config.data import OnError, SourceConfig
from alignment.config.faults import Fault, refuse
from alignment.config.model import ModelConfig
from alignment.config.run import RunConfig
from alignment.config.stage import StageConfig
from alignment.config.typed import convert
from alignment.core.artifacts import POLICY, ROWS_FILE, folder_name, read_manifest, verify
from alignment.core.errors import DataError, ModelError
from alignment.core.fingerprint import digest
from alignment.core.model_files import is_adapter
from alignment.data.formats import UnknownColumns
from alignment.data.reading import Reading, read_records, refuse_faults_of, start
from alignment.data.records import Record
from alignment.job import StageInput
from alignment.pipeline.plan import (
    chain_checks,
    made_rows,
    references,
    row_counts,
    scorer_checks,
    settings,
)
from alignment.pipeline.plan.actions import Action, Actions
from alignment.pipeline.plan.compose import compose, find_recipe
from alignment.pipeline.plan.made_rows import DATA
from alignment.pipeline.plan.overrides import without
from alignment.pipeline.plan.row_counts import Seen
from alignment.pipeline.remote.object_store import ObjectStore, connected
from alignment.pipeline.sources import data_sources
from alignment.pipeline.sources.data_sources import DataSource
from alignment.pipeline.sources.model_sources import ModelSource, refuse_policy, resolve
from alignment.pipeline.sources.peft_adapters import read_adapter, refuse_other_base
from alignment.stages import registry
from alignment.stages.base import DataSlot, Slot
from alignment.stages.registry import kind_of

CHECKED_ROWS = 20_000
"""Rows of a data file that are checked while planning, to keep planning fast; the stage checks all rows."""


Find = Callable[..., ModelSource]
"""Resolves the source of a model, as ``resolve`` does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStage:
    """A stage with its inputs resolved and its result named. ``inputs`` has an entry for each reference except arms.
    ``data`` is the main data file, ``extra_data`` has the others by field; hub data sets that are not here are missing
    in both, but ``hub_data`` lists all. Rows of the stages ``unmade`` do not exist yet. ``code`` names the functions
    that it runs. ``artifact`` is the folder of the result, ``work`` the folder in which it is made."""

    name: str
    config: StageConfig
    action: Action
    reason: str
    fingerprint: str
    identity: dict[str, Any]
    inputs: dict[str, StageInput]
    arms: dict[str, StageInput]
    input_fingerprints: dict[str, str]
    data: Path | None
    extra_data: dict[str, Path]
    hub_data: tuple[DataSource, ...]
    code: tuple[str, ...]
    seen: dict[str, Seen]
    artifact: Path
    work: Path
    unmade: tuple[str, ...] = ()

    @property
    def has_to_run(self) -> bool:
        """Whether there is no complete result yet, neither here nor in the store."""
        return self.action in (Action.run, Action.resume)

    @property
    def user_code(self) -> list[str]:
        """The functions that do not ship with the project."""
        return [function for function in self.code if not function.startswith("bundled:")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All that ``run`` needs. ``sources`` are the models from outside the run, by reference; ``dropped_gates`` are the
    stages whose gates the ``profile`` removed. ``unread_files`` have the names of shipped files. ``unread_settings``
    have no effect, and are at their defaults in ``config``. ``store`` holds artifacts for several machines."""

    recipe: str
    overrides: tuple[str, ...]
    config: RunConfig
    output: Path
    base: ModelSource
    sources: dict[str, ModelSource]
    stages: tuple[PlannedStage, ...]
    profile: str = ""
    dropped_gates: tuple[str, ...] = ()
    unread_files: tuple[Path, ...] = ()
    unread_settings: tuple[Fault, ...] = ()
    store: ObjectStore | None = None
    verified: bool = False

    @property
    def run_folder(self) -> Path:
        """Where this run is recorded."""
        return self.output / "runs" / self.config.name


def make_plan(recipe: str, overrides: Sequence[str], *, find: Find = resolve, verified: bool = False) -> Plan:
    """Composes, checks and plans. ``find`` resolves the source of a model. If ``verified``, results to reuse are
    compared with their hashes. Raises ConfigError: lists all faults of recipe, overrides and references; DataError,
    ModelError, ArtifactError, StoreError: something is missing, damaged or does not fit."""
    composition, recipe_folder = compose(recipe, overrides), find_recipe(recipe).parent
    config, faults = convert(composition.tree, registry.config_classes())
    faults = [*composition.faults, *faults]
    named = {fault.where for fault in faults}  # a faulty field holds its default, so more faults of it would mislead
    written = composition.tree.get("stages")
    unreadable = set(written if isinstance(written, Mapping) else ()) - set(config.stages)
    in_references = references.faults(config.stages, unreadable=unreadable)
    faults += [fault for fault in in_references if fault.where.partition("[")[0] not in named]
    named |= {fault.where for fault in faults}
    later = [
        *scorer_checks.faults(config.stages, hang_seconds=config.launch.hang_seconds, recipe_folder=recipe_folder),
        *settings.faults(config),
    ]
    every_fault = [*faults, *(fault for fault in later if fault.where not in named)]
    unread_settings = tuple(fault for fault in every_fault if fault.reader)
    refused = [fault for fault in every_fault if not fault.reader]
    refused += made_rows.faults(config.stages) if not refused else []
    refuse([composition.placed(fault) for fault in refused])
    if unread_settings:  # a result does not depend on them, so its fingerprint must not either
        read = without(composition.tree, {fault.where for fault in unread_settings})
        config, _ = convert(read, registry.config_classes())
    config = settings.completed(config)
    data, seen = _checked_data(config, recipe_folder)
    if not composition.names_model and config.model.source == ModelConfig().source:
        config.model.source = _base_of_adapters(config, find) or config.model.source
    base = find(config.model.source, where="model.source")
    refuse([composition.placed(fault) for fault in settings.option_faults(config.model, base.folder)])
    output = Path(config.output).expanduser().absolute()
    store = None if config.artifacts is None else connected(config.artifacts)
    actions = Actions(output / "artifacts", output / "runs" / config.name, store, verified=verified)
    builder = _Builder(config=config, output=output, data=data, seen=seen, base=base, find=find, actions=actions)
    stages = tuple(builder.stage(name) for name in references.in_order(config.stages))
    of_stages = [row_counts.gate_faults(stage.config, stage.seen, where=f"stages.{stage.name}") for stage in stages]
    refuse([composition.placed(fault) for faults_of_stage in of_stages for fault in faults_of_stage])
    return Plan(
        recipe=recipe,
        overrides=tuple(overrides),
        config=config,
        output=output,
        base=builder.base,
        sources=builder.sources,
        stages=stages,
        profile=composition.profile,
        dropped_gates=composition.dropped_gates,
        unread_files=composition.unread,
        unread_settings=unread_settings,
        store=store,
        verified=verified,
    )


def _base_of_adapters(config: RunConfig, find: Find) -> str:
    """The base model that an adapter from outside names, if stages start from one; the first if they name several,
    and empty if they name none."""
    for name, stage in config.stages.items():
        for slot in references.slots(stage):
            where = f"stages.{name}.{slot.field}"
            if slot.field == "init" and references.is_external(slot):
                path = Path(slot.ref.removeprefix("path:")).expanduser().absolute()
                is_hub = slot.ref.startswith("hub:")
                folder = find(slot.ref, where=where, adapter_fits=True).folder if is_hub else path
                if folder is not None and is_adapter(folder) and (base := read_adapter(folder, where=where).base):
                    return base
    return ""


def made_again(plan: Plan) -> Plan:
    """The plan of the same run, after something came onto this machine."""
    return make_plan(plan.recipe, plan.overrides, verified=plan.verified)


def _checked_data(
    config: RunConfig, recipe_folder: Path
) -> tuple[dict[str, dict[str, DataSource]], dict[str, dict[str, Seen]]]:
    located: dict[str, dict[str, DataSource]] = {}
    seen: dict[str, dict[str, Seen]] = {}
    read: dict[Any, Seen] = {}
    for name, stage in config.stages.items():
        located[name], seen[name] = {}, {}
        for hub_data in kind_of(stage).files.hub_data(stage):
            located[name][hub_data] = data_sources.resolve(hub_data, where=f"stages.{name}")
        for file in made_rows.data_slots(stage):
            if made_rows.stage_named(file.data.source) is not None:
                continue
            where = f"stages.{name}.{file.field}"
            source = located[name][file.field] = data_sources.resolve(
                file.data.source, where=f"{where}.source", recipe_folder=recipe_folder
            )
            if source.path is None:
                continue
            asked = (source.path, digest(_first_rows(file.data)), file.data.on_error, file.data.max_skipped)
            key = (*asked, file.record, file.checks, file.skippable_checks, file.label)
            if key not in read:
                read[key] = _read(file, source.path, where=where)
            seen[name][file.field] = read[key]
    return located, seen


def _first_rows(data: SourceConfig) -> SourceConfig:
    return replace(data, limit=min(data.limit or CHECKED_ROWS, CHECKED_ROWS))


def _read(file: DataSlot, path: Path, *, where: str) -> Seen:
    how = _first_rows(file.data)
    try:
        reading = start(path, how, setting=where)
    except UnknownColumns as error:
        columns = ", ".join(f"{name}: YOURS" for name in json.loads(file.record.EXAMPLE))
        raise DataError(
            f"{error.message} of {path}",
            where=where,
            remedy=f"this stage needs rows like {file.record.EXAMPLE}, or another form of docs/data.md; "
            f"rename the columns, or map them: {where}.columns={{{columns}}}",
        ) from error
    first = read_records(path, file.record, how, reading=reading)
    records = _usable(first, file, reading)
    for record in records:
        for check in file.checks:
            check(record)
    return row_counts.seen(
        records,
        whole=how.limit == file.data.limit or len(first) < CHECKED_ROWS,
        set_aside=reading.set_aside.reasons,
        label=file.label,
    )


def _usable(records: Sequence[Record], file: DataSlot, reading: Reading) -> list[Record]:
    usable = []
    for record in records:
        try:
            for check in file.skippable_checks:
                check(record)
        except DataError as error:
            if file.data.on_error is not OnError.skip:
                raise
            reading.leave_out(error)
        else:
            usable.append(record)
    if len(usable) < len(records):
        refuse_faults_of(reading, _first_rows(file.data))
    return usable


@dataclass(kw_only=True)
class _Builder:
    """Plans stages in order; each finds its inputs among those that are planned already."""

    config: RunConfig
    output: Path
    data: dict[str, dict[str, DataSource]]
    seen: dict[str, dict[str, Seen]]
    base: ModelSource
    find: Find
    actions: Actions
    sources: dict[str, ModelSource] = field(default_factory=dict)
    planned: dict[str, PlannedStage] = field(default_factory=dict)
    num_layers: dict[str, int] = field(default_factory=dict)

    def stage(self, name: str) -> PlannedStage:
        """Plans one stage; the stages of its inputs must be planned already."""
        config = self.config.stages[name]
        slots = list(references.slots(config))
        inputs = {slot.field: self._resolve(name, slot) for slot in slots if not references.is_arm(slot)}
        arms = {slot.ref: self._resolve(name, slot) for slot in slots if references.is_arm(slot)}
        contents = {key: fingerprint for key, (_, fingerprint) in {**inputs, **arms}.items()}
        if (trained := registry.as_trained(config)) is not None:
            init, _ = inputs["init"]
            self._count_layers(name, config, init)
            if init.path is not None and is_adapter(init.path):
                outside = read_adapter(init.path, where=f"stages.{name}.init").shape
                refuse(chain_checks.outside_faults(trained, outside, f"stages.{name}.adapter"))
        files = kind_of(config).files.paths(config, self.output / "runs" / self.config.name / name)
        described = self._identity(
            name, config, {field: contents[field] for field in inputs}, {arm: contents[arm] for arm in arms}, files
        )
        fingerprint = digest(described)
        artifact = self.output / "artifacts" / folder_name(name, fingerprint)
        work = artifact.with_name(f"{artifact.name}.work")
        refs = {field: stage_input.ref for field, (stage_input, _) in inputs.items()}
        paths = {field: source.path for field, source in self.data[name].items() if source.path is not None}
        made, seen, unmade = self._rows_of_stages(name, config)
        paths |= {**made, **files}
        action, reason = self.actions.decide(
            name, fingerprint, artifact=artifact, work=work, described=described, refs=refs
        )
        planned = PlannedStage(
            name=name,
            config=kind_of(config).files.located(scorer_checks.with_files(config)),
            action=action,
            reason=reason,
            fingerprint=fingerprint,
            identity=described,
            inputs={field: stage_input for field, (stage_input, _) in inputs.items()},
            arms={arm: stage_input for arm, (stage_input, _) in arms.items()},
            input_fingerprints=contents,
            data=paths.get(DATA),
            extra_data={field: path for field, path in paths.items() if field != DATA},
            hub_data=tuple(source for source in self.data[name].values() if source.is_hub),
            code=(*map(str, scorer_checks.functions(config).values()), *kind_of(config).files.code(config)),
            seen={**self.seen[name], **seen},
            artifact=artifact,
            work=work,
            unmade=unmade,
        )
        self.planned[name] = planned
        return planned

    def _count_layers(self, name: str, config: StageConfig, init: StageInput) -> None:
        """Raises ConfigError: the stage needs another number of layers than its ``init`` has."""
        folder = self.base.folder if init.path is None or is_adapter(init.path) else init.path
        stage = made_rows.stage_named(init.ref)
        layers = self.num_layers.get(stage) if stage else None if folder is None else chain_checks.num_layers(folder)
        if layers is not None:
            self.num_layers[name] = kind_of(config).learning.layers(config, layers, f"stages.{name}")

    def _identity(
        self,
        name: str,
        config: StageConfig,
        inputs: dict[str, str],
        arms: dict[str, str],
        files: Mapping[str, Path],
    ) -> dict[str, Any]:
        if kind_of(config).in_driver:
            others = references.inputs_of(name, self.config.stages)
            fingerprints = {other: self.planned[other].fingerprint for other in others}
            return references.of_report(self.config, name, inputs=fingerprints)
        return references.of_stage(
            self.config,
            name,
            base=self.base,
            data={field: source.identity for field, source in self.data[name].items()},
            inputs=inputs,
            arms=arms,
            files=files,
        )

    def _rows_of_stages(
        self, name: str, config: StageConfig
    ) -> tuple[dict[str, Path], dict[str, Seen], tuple[str, ...]]:
        """The data that other stages make: its files and what is seen of those that exist, by field, and the stages
        that have yet to make theirs."""
        paths: dict[str, Path] = {}
        seen: dict[str, Seen] = {}
        unmade: dict[str, None] = {}
        for file in made_rows.data_slots(config):
            maker = made_rows.stage_named(file.data.source)
            if maker is None:
                continue
            planned = self.planned[maker]
            path = paths[file.field] = planned.artifact / ROWS_FILE
            if planned.action is Action.reuse:
                seen[file.field] = _read(file, path, where=f"stages.{name}.{file.field}")
            else:
                unmade[maker] = None
        return paths, seen, tuple(unmade)

    def _resolve(self, name: str, slot: Slot) -> tuple[StageInput, str]:
        """What a reference leads to (None: the base model), and the fingerprint of the content there."""
        if references.is_base(slot):
            return StageInput(ref=slot.ref, path=None), self.base.identity
        if (stage := references.stage_of(slot)) is not None:
            planned = self.planned[stage]
            return StageInput(ref=slot.ref, path=planned.artifact), planned.fingerprint
        where, fitting = f"stages.{name}.{slot.field}", references.what_fits(slot, self.config.stages)
        if slot.ref.startswith("path:"):
            folder = Path(slot.ref.removeprefix("path:")).expanduser().absolute()
            if read_manifest(folder) is not None:
                manifest = verify(folder, content=self.actions.verified)
                if manifest.kind in slot.takes:
                    return StageInput(ref=slot.ref, path=folder), manifest.fingerprint
                message = f"{folder} contains an artifact of kind {manifest.kind}"
                raise ModelError(message, where=where, remedy=fitting)
            if POLICY not in slot.takes and not slot.external:
                raise ModelError(f"no artifact in {folder}", where=where, remedy=fitting)
        source = self.sources[slot.ref] = self.find(slot.ref, where=where, adapter_fits=POLICY in slot.takes)
        if source.folder is not None and is_adapter(source.folder):
            refuse_other_base(read_adapter(source.folder, where=where), self.base, where=where)
        if slot.external:
            refuse_policy(source, where=where, advice=fitting)
        return StageInput(ref=slot.ref, path=source.folder), source.identity
