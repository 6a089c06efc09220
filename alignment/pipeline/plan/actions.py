"""What happens to a stage: it runs, continues, or its result is reused, from this folder or from a store."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

from alignment.core.artifacts import read_manifest, verify
from alignment.core.errors import ArtifactError
from alignment.pipeline.plan.reasons import Made, made, reason_to_run
from alignment.pipeline.remote.object_store import ObjectStore
from alignment.pipeline.remote.remote_checkpoints import RemoteCheckpoints, local_work
from alignment.pipeline.remote.remote_results import manifest_in
from alignment.records.run import RunRecord


class Action(str, Enum):
    """What happens to a stage."""

    run = "run"
    resume = "resume"
    fetch = "fetch"
    reuse = "reuse"


class Actions:
    """Decides for each stage of a run, by what is in the folder of artifacts and in the ``store``, if there is one."""

    def __init__(self, artifacts: Path, run_folder: Path, store: ObjectStore | None, *, verified: bool) -> None:
        """``verified`` results are read and compared with their hashes; of others, only sizes are compared."""
        self.verified = verified
        self._made: list[Made] = made(artifacts)
        self._own = _results_of(run_folder)
        self._store = store

    def decide(
        self,
        name: str,
        fingerprint: str,
        *,
        artifact: Path,
        work: Path,
        described: dict[str, Any],
        refs: dict[str, str],
    ) -> tuple[Action, str]:
        """The action, and its reason in words.

        Raises:
            ArtifactError: the manifest of a result cannot be read, or is that of another one whose fingerprint starts
                the same.
            StoreError: the store cannot be reached or refuses.
        """
        stored = self._store is not None and manifest_in(self._store, artifact.name, fingerprint=fingerprint)
        manifest, damage = read_manifest(artifact), ""
        if manifest is not None:
            if manifest.fingerprint != fingerprint:
                raise ArtifactError(
                    "contains another result whose fingerprint starts with the same characters",
                    where=str(artifact),
                    remedy=f"move {artifact} away",
                )
            damage = damage_of(artifact, content=self.verified)
            if not damage:
                return Action.reuse, artifact.name + self._where(stored=bool(stored))
        if stored:
            return Action.fetch, damage or f"{artifact.name} from the store"
        if damage:
            return Action.run, damage
        return self._continued(fingerprint, work) or (
            Action.run,
            reason_to_run(name, described, refs, self._made, own=self._own),
        )

    def _where(self, *, stored: bool) -> str:
        if self._store is None:
            return ""
        return ", here and in the store" if stored else ", here; a run will upload it"

    def _continued(self, fingerprint: str, work: Path) -> tuple[Action, str] | None:
        """From where an unfinished stage goes on, here or in the store."""
        local = local_work(work)
        if self._store is not None:
            remote = next(iter(RemoteCheckpoints(self._store, fingerprint).complete()), None)
            if remote is not None and remote.progress > local.progress:
                return Action.resume, f"from {remote.label} in the store"
        if local.newest is not None:
            return Action.resume, f"from {local.newest.name}"
        return (Action.resume, f"from {local.parts} stored parts") if local.parts else None


def damage_of(artifact: Path, *, content: bool) -> str:
    """Why a result cannot be reused, and what a run does about it; empty if its files are as its manifest lists them.

    Files are compared by their sizes, and by their hashes too if ``content``.
    """
    try:
        verify(artifact, content=content)
    except ArtifactError as error:
        file = error.where.removeprefix(f"{artifact}/")
        return f"{artifact.name} is damaged: {file}: {error.message}; a run moves it to {aside(artifact).name}"
    return ""


def aside(artifact: Path) -> Path:
    """Where a run moves a damaged result."""
    return artifact.with_name(f"{artifact.name}.damaged")


def _results_of(run_folder: Path) -> frozenset[str]:
    """Names of the artifacts in the run's record; empty if the record cannot be read."""
    try:
        stages = RunRecord.read(run_folder).stages
    except ArtifactError:
        return frozenset()
    return frozenset(Path(stage.artifact).name for stage in stages.values())
