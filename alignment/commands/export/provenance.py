"""The origin and the measurements of an artifact, read from the artifacts and runs beside it.

Names of stages and of data are in the run's record; content and metrics are in the artifacts. Missing artifacts are
left out and listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.core.artifacts import MANIFEST, Manifest, read_manifest
from alignment.core.errors import ArtifactError
from alignment.core.terminal import complain
from alignment.records.evaluation import ArmResult, Comparison, Evaluation, JudgedPair
from alignment.records.run import FILE as RUN_FILE
from alignment.records.run import RunRecord
from alignment.records.stages import ArmForgetting, Forgetting, Limits
from alignment.stages.base import ResultTable
from alignment.stages.kind_problems import KindError
from alignment.stages.registry import tables_of

_FOLDERS = re.compile(r"(?<![\w.<])(?:~|\.\.?)?/(?:[^\s/'\",\]})]+/)*(?=\S)")
"""A path without its last part, anywhere in a text."""
_MARKED = re.compile(r"(?:(?<=path:)|(?<=['\"]))(?:~|\.\.?)?/(?:[^/'\",\]})]+/)*")
"""The same behind ``path:`` or a quotation mark, where it may contain spaces."""
_WHOLE = re.compile(r"^((?:[^=/\s]*=)?[\"']?(?:path:)?)(?:~|\.\.?)?/(?:.*/)?")
"""The same where a path is the whole value, with or without its key."""
_NOT_MAKING = re.compile(r"output=|artifacts=|launch|tracking|[+~]*stages\.[^.=]+\.judge\b")
"""Overrides that do not affect a model; a judge's may name an internal host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A stage on the way to the artifact; ``data`` are its sources as named in the run's record, the main one first."""

    manifest: Manifest
    data: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """An evaluation with this artifact as one of its arms."""

    arm: ArmResult
    evaluation: Evaluation
    manifest: Manifest

    @property
    def comparisons(self) -> list[Comparison]:
        """The paired differences with this artifact."""
        return [pair for pair in self.evaluation.comparisons if self.arm.name in (pair.arm, pair.against)]

    @property
    def verdicts(self) -> list[JudgedPair]:
        """The judge's pairs whose first arm is this artifact."""
        judge = self.evaluation.judge
        return [] if judge is None else [pair for pair in judge.pairs if pair.arm == self.arm.name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Remembered:
    """A measurement of forgetting of this artifact, and its limits."""

    arm: ArmForgetting
    limits: Limits
    manifest: Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Tabled:
    """A result of another kind that has this artifact as the arm ``arm``, with the tables that the kind brings."""

    arm: str
    tables: list[ResultTable]
    manifest: Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """``steps`` are in order, the artifact itself last; ``lost`` names inputs whose artifacts are missing.

    ``own`` are the tables of the artifact itself. ``command`` made the run, without the machine's folders; it is empty
    if no run is known. ``profile`` is that run's profile, or empty.
    """

    steps: list[Step]
    lost: list[str] = field(default_factory=list)
    own: list[ResultTable] = field(default_factory=list)
    evaluation: Judged | None = None
    forgetting: Remembered | None = None
    others: list[Tabled] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    profile: str = ""


def provenance(artifact: Path, manifest: Manifest, run: str | None = None) -> Provenance:
    """The origin of a result in a folder of artifacts with runs beside it; ``run`` is the preferred run."""
    store = _store(artifact.parent)
    records = _records(artifact.parent.parent / "runs", run)
    steps, lost = _steps(manifest, store)
    own_record = next((record for record in records if artifact.name in _artifacts(record)), None)
    named = [Step(manifest=step, data=_sources(store.get(step.fingerprint, artifact).name, records)) for step in steps]
    return Provenance(
        steps=named,
        lost=lost,
        own=_tables(artifact, manifest),
        evaluation=_evaluation(manifest, store, own_record),
        forgetting=_forgetting(manifest, store, own_record),
        others=list(_others(manifest, store, own_record)),
        command=_command(own_record) if own_record else [],
        profile=own_record.profile if own_record else "",
    )


def without_folders(text: str) -> str:
    """The text without the folders of the machine that wrote it: only the last part of a path stays."""
    return _FOLDERS.sub("", text)


def value_without_folders(value: str) -> str:
    """A source, an override or the name of a file without folders of the machine, which may contain spaces."""
    return _FOLDERS.sub("", _MARKED.sub("", _WHOLE.sub(r"\1", value)))


def _store(folder: Path) -> dict[str, Path]:
    """Artifacts by fingerprint."""
    folders = {}
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        manifest = _read(path.parent)
        if manifest is not None:
            folders[manifest.fingerprint] = path.parent
    return folders


def _read(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except ArtifactError:  # damage of another artifact does not matter here
        return None


def _records(folder: Path, first: str | None) -> list[RunRecord]:
    """What runs are recorded, the named one first, then the newest ones."""
    records = []
    for path in folder.glob(f"*/{RUN_FILE}"):
        with suppress(ArtifactError):
            records.append((path.parent.name == first, RunRecord.read(path.parent)))
    return [record for _, record in sorted(records, key=lambda pair: (pair[0], pair[1].started), reverse=True)]


def _artifacts(record: RunRecord) -> dict[str, str]:
    """The stages of a run by their artifact's name."""
    return {Path(stage.artifact).name: name for name, stage in record.stages.items()}


def _steps(manifest: Manifest, store: dict[str, Path]) -> tuple[list[Manifest], list[str]]:
    """The artifact and all its inputs, each after its own inputs."""
    done: dict[str, Manifest] = {}
    lost: list[str] = []

    def visit(artifact: Manifest) -> None:
        for name, fingerprint in artifact.inputs.items():
            if fingerprint in done or not _is_fingerprint(fingerprint):  # otherwise it is a model from outside
                continue
            folder = store.get(fingerprint)
            input_manifest = None if folder is None else _read(folder)
            if input_manifest is None:
                lost.append(f"{name} of {artifact.stage}, `{fingerprint[:8]}`")
            else:
                visit(input_manifest)
        done[artifact.fingerprint] = artifact

    visit(manifest)
    return list(done.values()), lost


def _is_fingerprint(value: str) -> bool:
    return ":" not in value


def _sources(artifact: str, records: list[RunRecord]) -> list[str]:
    for record in records:
        stage = _artifacts(record).get(artifact)
        if stage and (settings := record.settings_of(stage)):
            return [value_without_folders(source) for source in _named(settings.get("data")) if source]
    return []


def _named(data: Any) -> Iterator[str]:
    if isinstance(data, dict):
        yield str(data.get("source") or "")
        for part in data.get("mix") or []:
            yield str(part.get("source") or "")


def _command(record: RunRecord) -> list[str]:
    """The command without overrides for folders, launching, tracking and judges, which do not affect a model."""
    overrides = [text for text in record.overrides if not _NOT_MAKING.match(text)]
    return ["align", "run", *map(value_without_folders, [record.recipe or "RECIPE", *overrides])]


def _evaluation(manifest: Manifest, store: dict[str, Path], run: RunRecord | None) -> Judged | None:
    result = _measurement("evaluation", manifest, store, run)
    if result is None:
        return None
    try:
        record = Evaluation.read(result.folder)
    except (ArtifactError, OSError):
        return None
    arm = record.arm(result.arm)
    return None if arm is None else Judged(arm=arm, evaluation=record, manifest=result.manifest)


def _forgetting(manifest: Manifest, store: dict[str, Path], run: RunRecord | None) -> Remembered | None:
    result = _measurement("forgetting", manifest, store, run)
    if result is None:
        return None
    try:
        record = Forgetting.read(result.folder)
    except (ArtifactError, OSError):
        return None
    arm = next((arm for arm in record.arms if arm.name == result.arm), None)
    return None if arm is None else Remembered(arm=arm, limits=record.limits, manifest=result.manifest)


def _others(manifest: Manifest, store: dict[str, Path], run: RunRecord | None) -> Iterator[Tabled]:
    """The results of kinds that bring their own tables, one of each kind."""
    kinds = {candidate.kind for folder in store.values() if (candidate := _read(folder)) is not None}
    for kind in sorted(kinds):
        result = _measurement(kind, manifest, store, run)
        if result is not None:
            tables = _tables(result.folder, result.manifest)
            if tables:
                yield Tabled(arm=result.arm, tables=tables, manifest=result.manifest)


def _tables(folder: Path, manifest: Manifest) -> list[ResultTable]:
    """The tables that the kind of a result brings; none if its files cannot be read or the kind's function fails."""
    try:
        return tables_of(manifest.identity.get("kind", ""), folder)
    except KindError as error:
        complain(error)
        return []
    except (ArtifactError, OSError):
        return []


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measurement:
    """A result that has the artifact among its arms, under the name ``arm``."""

    folder: Path
    manifest: Manifest
    arm: str


def _measurement(kind: str, manifest: Manifest, store: dict[str, Path], run: RunRecord | None) -> _Measurement | None:
    """The result of this kind with the artifact among its arms: the run's own one, or else the newest."""
    own = _artifacts(run) if run else {}
    results = []
    for folder in store.values():
        candidate = _read(folder)
        if candidate is None or candidate.kind != kind:
            continue
        arms = candidate.identity.get("arms", {})
        arm = next((name for name in arms if candidate.inputs.get(name) == manifest.fingerprint), None)
        if arm is not None:
            results.append(_Measurement(folder=folder, manifest=candidate, arm=arm))
    return max(results, key=lambda result: (result.folder.name in own, result.manifest.created), default=None)
