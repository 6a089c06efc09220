"""What an artifact came from and what was measured of it, read from the artifacts and runs that lie around it.

Names of stages and of data are in the run's record, content and figures in the artifacts. What is not there any more is
left out, and said.
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
from alignment.records.evaluation import ArmResult, Comparison, Evaluation, JudgedPair
from alignment.records.forgetting import ArmForgetting, Forgetting, Limits
from alignment.records.run import FILE as RUN_FILE
from alignment.records.run import RunRecord

_PLACE = re.compile(r"(?<![\w.])(?:~|\.\.?)?/(?:[^\s/'\",\]})]+/)*")
"""A path but for its last part, wherever it begins in a text."""
_NOT_MAKING = re.compile(r"output=|launch|tracking|[+~]*stages\.[^.=]+\.judge\b")
"""Overrides that shape no model; a judge's may name an internal host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A stage on the way to the artifact; ``data`` are its sources as the run's record names them, main one first."""

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
        """The paired differences that it is part of."""
        return [one for one in self.evaluation.comparisons if self.arm.name in (one.arm, one.against)]

    @property
    def verdicts(self) -> list[JudgedPair]:
        """The judge's pairs of which it is the first."""
        judge = self.evaluation.judge
        return [] if judge is None else [pair for pair in judge.pairs if pair.arm == self.arm.name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Remembered:
    """What a stage ``forgetting`` measured of this artifact, and the limits that it was given."""

    arm: ArmForgetting
    limits: Limits
    manifest: Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """``steps`` are in order, the artifact itself last; ``lost`` names inputs whose artifacts are not there.

    ``command`` is what made the run, without the machine's folders; empty where no run is known. ``profile`` is what
    scaled that run, if anything did.
    """

    steps: list[Step]
    lost: list[str] = field(default_factory=list)
    evaluation: Judged | None = None
    forgetting: Remembered | None = None
    command: list[str] = field(default_factory=list)
    profile: str = ""


def provenance(artifact: Path, manifest: Manifest, run: str | None = None) -> Provenance:
    """Of a result in a store of artifacts beside which runs are recorded; ``run`` is preferred among those."""
    store = _store(artifact.parent)
    records = _records(artifact.parent.parent / "runs", run)
    steps, lost = _steps(manifest, store)
    mine = next((record for record in records if artifact.name in _artifacts(record)), None)
    named = [Step(manifest=one, data=_sources(store.get(one.fingerprint, artifact).name, records)) for one in steps]
    return Provenance(
        steps=named,
        lost=lost,
        evaluation=_evaluation(manifest, store, mine),
        forgetting=_forgetting(manifest, store, mine),
        command=_command(mine) if mine else [],
        profile=mine.profile if mine else "",
    )


def without_places(text: str) -> str:
    """The text without the folders of the machine that it was written on: of a path only the last part stays."""
    return _PLACE.sub("", text)


def _store(folder: Path) -> dict[str, Path]:
    """Artifacts by fingerprint."""
    found = {}
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        one = _read(path.parent)
        if one is not None:
            found[one.fingerprint] = path.parent
    return found


def _read(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except ArtifactError:  # another one's damage is not this one's
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
    """The artifact and all that it was made of, each behind its inputs."""
    done: dict[str, Manifest] = {}
    lost: list[str] = []

    def visit(one: Manifest) -> None:
        for name, fingerprint in one.inputs.items():
            if fingerprint in done or not _is_fingerprint(fingerprint):  # else a model from outside
                continue
            folder = store.get(fingerprint)
            found = None if folder is None else _read(folder)
            if found is None:
                lost.append(f"{name} of {one.stage}, `{fingerprint[:8]}`")
            else:
                visit(found)
        done[one.fingerprint] = one

    visit(manifest)
    return list(done.values()), lost


def _is_fingerprint(value: str) -> bool:
    return ":" not in value


def _sources(artifact: str, records: list[RunRecord]) -> list[str]:
    for record in records:
        stage = _artifacts(record).get(artifact)
        if stage and (settings := record.settings_of(stage)):
            return [without_places(source) for source in _named(settings.get("data")) if source]
    return []


def _named(data: Any) -> Iterator[str]:
    if isinstance(data, dict):
        yield str(data.get("source") or "")
        for part in data.get("mix") or []:
            yield str(part.get("source") or "")


def _command(record: RunRecord) -> list[str]:
    """Settings that say where a run lies, or who judged it, say nothing of how it was made."""
    told = [one for one in record.overrides if not _NOT_MAKING.match(one)]
    return ["align", "run", without_places(record.recipe or "RECIPE"), *map(without_places, told)]


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
        one = _read(folder)
        if one is None or one.kind != kind:
            continue
        arm = next((name for name in one.identity["arms"] if one.inputs.get(name) == manifest.fingerprint), None)
        if arm is not None:
            results.append(_Measurement(folder=folder, manifest=one, arm=arm))
    return max(results, key=lambda result: (result.folder.name in own, result.manifest.created), default=None)
