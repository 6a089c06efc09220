"""The origin and the measurements of an artifact, read from the artifacts and runs beside it.

Names of stages and of data are in the run's record; content and metrics are in the artifacts. Missing artifacts are
left out and listed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from alignment.core.artifacts import MANIFEST, Manifest, read_manifest
from alignment.core.errors import ArtifactError
from alignment.core.terminal import complain
from alignment.records.evaluation import ArmResult, Evaluation
from alignment.records.run import FILE as RUN_FILE
from alignment.records.run import RunRecord
from alignment.records.stages import ArmForgetting, Forgetting
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
class Measured:
    """A result with this artifact as one of its arms: an ``ArmResult`` of an ``Evaluation``, an ``ArmForgetting`` of a
    ``Forgetting``, or the arm's name and the tables that another kind brings."""

    arm: Any
    record: Any
    manifest: Manifest


Store: TypeAlias = Mapping[str, tuple[Path, Manifest]]
"""Artifacts by fingerprint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """``steps`` are in order, the artifact itself last; ``lost`` names inputs whose artifacts are missing. ``own`` are
    the tables of the artifact itself. ``command`` made the run, without the machine's folders; it is empty if no run is
    known. ``profile`` is that run's profile, or empty."""

    steps: list[Step]
    lost: list[str] = field(default_factory=list)
    own: list[ResultTable] = field(default_factory=list)
    evaluation: Measured | None = None
    forgetting: Measured | None = None
    others: list[Measured] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    profile: str = ""


def provenance(artifact: Path, manifest: Manifest, run: str | None = None) -> Provenance:
    """The origin of a result in a folder of artifacts with runs beside it; ``run`` is the preferred run."""
    store = _store(artifact.parent)
    records = _records(artifact.parent.parent / "runs", run)
    steps, lost = _steps(manifest, store)
    own = next((record for record in records if artifact.name in _artifacts(record)), None)
    kinds = sorted({candidate.kind for _, candidate in store.values()})
    tabled = [_measured(kind, manifest, store, own, lambda name, *result: (name, _tables(*result))) for kind in kinds]
    folder_of = {fingerprint: folder for fingerprint, (folder, _) in store.items()}
    return Provenance(
        steps=[Step(manifest=s, data=_sources(folder_of.get(s.fingerprint, artifact).name, records)) for s in steps],
        lost=lost,
        own=_tables(artifact, manifest),
        evaluation=_measured("evaluation", manifest, store, own, _of_evaluation),
        forgetting=_measured("forgetting", manifest, store, own, _of_forgetting),
        others=[result for result in tabled if result is not None and result.record],
        command=_command(own) if own else [],
        profile=own.profile if own else "",
    )


def without_folders(text: str) -> str:
    """The text without the folders of the machine that wrote it: only the last part of a path stays."""
    return _FOLDERS.sub("", text)


def value_without_folders(value: str) -> str:
    """A source, an override or the name of a file without folders of the machine, which may contain spaces."""
    return _FOLDERS.sub("", _MARKED.sub("", _WHOLE.sub(r"\1", value)))


def _store(folder: Path) -> Store:
    """The artifacts of a folder; damage of another one does not matter here."""
    store = {}
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        with suppress(ArtifactError):
            if (manifest := read_manifest(path.parent)) is not None:
                store[manifest.fingerprint] = (path.parent, manifest)
    return store


def _records(folder: Path, first: str | None) -> list[RunRecord]:
    records = []
    for path in folder.glob(f"*/{RUN_FILE}"):
        with suppress(ArtifactError):
            records.append((path.parent.name == first, RunRecord.read(path.parent)))
    return [record for _, record in sorted(records, key=lambda pair: (pair[0], pair[1].started), reverse=True)]


def _artifacts(record: RunRecord) -> dict[str, str]:
    return {Path(stage.artifact).name: name for name, stage in record.stages.items()}


def _steps(manifest: Manifest, store: Store) -> tuple[list[Manifest], list[str]]:
    """The artifact and all its inputs, each after its own inputs."""
    done: dict[str, Manifest] = {}
    lost: list[str] = []

    def visit(artifact: Manifest) -> None:
        for name, fingerprint in artifact.inputs.items():
            if fingerprint in done or ":" in fingerprint:  # a model from outside
                continue
            if fingerprint in store:
                visit(store[fingerprint][1])
            else:
                lost.append(f"{name} of {artifact.stage}, `{fingerprint[:8]}`")
        done[artifact.fingerprint] = artifact

    visit(manifest)
    return list(done.values()), lost


def _sources(artifact: str, records: list[RunRecord]) -> list[str]:
    """The sources of the stage that made an artifact, its main one first, as a run names them."""
    for record in records:
        stage = _artifacts(record).get(artifact)
        if stage and (settings := record.settings_of(stage)):
            data = settings.get("data")
            parts = [data, *(data.get("mix") or [])] if isinstance(data, dict) else []
            return [value_without_folders(str(part["source"])) for part in parts if part.get("source")]
    return []


def _command(record: RunRecord) -> list[str]:
    """The command without overrides for folders, launching, tracking and judges, which do not affect a model."""
    overrides = [text for text in record.overrides if not _NOT_MAKING.match(text)]
    return ["align", "run", *map(value_without_folders, [record.recipe or "RECIPE", *overrides])]


def _of_evaluation(name: str, folder: Path, _: Manifest) -> tuple[ArmResult | None, Evaluation]:
    record = Evaluation.read(folder)
    return record.arm(name), record


def _of_forgetting(name: str, folder: Path, _: Manifest) -> tuple[ArmForgetting | None, Forgetting]:
    record = Forgetting.read(folder)
    return next((arm for arm in record.arms if arm.name == name), None), record


def _tables(folder: Path, manifest: Manifest) -> list[ResultTable]:
    """The tables that the kind of a result brings; none if its files cannot be read or the kind's function fails."""
    try:
        return tables_of(manifest.identity.get("kind", ""), folder)
    except KindError as error:
        complain(error)
        return []
    except (ArtifactError, OSError):
        return []


def _measured(
    kind: str,
    manifest: Manifest,
    store: Store,
    run: RunRecord | None,
    read: Callable[[str, Path, Manifest], tuple[Any, Any]],
) -> Measured | None:
    """The result of this kind with the artifact among its arms: the run's own one, or else the newest."""
    own = _artifacts(run) if run else {}
    results = []
    for folder, candidate in store.values():
        arms = candidate.identity.get("arms", {}) if candidate.kind == kind else {}
        named = next((name for name in arms if candidate.inputs.get(name) == manifest.fingerprint), None)
        if named is not None:
            results.append((named, folder, candidate))
    chosen = max(results, key=lambda result: (result[1].name in own, result[2].created), default=None)
    if chosen is not None:
        with suppress(ArtifactError, OSError):
            arm, record = read(*chosen)
            return None if arm is None else Measured(arm=arm, record=record, manifest=chosen[2])
    return None
