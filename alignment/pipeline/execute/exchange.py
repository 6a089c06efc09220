"""What a run exchanges with its store of artifacts: results, and checkpoints of the stage that runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from alignment.core.artifacts import MANIFEST, read_manifest
from alignment.core.locks import held, is_held
from alignment.pipeline.execute.display import Announce
from alignment.pipeline.plan.actions import Action, aside, damage_of
from alignment.pipeline.plan.plan import Plan, PlannedStage, made_again
from alignment.pipeline.remote.lease import leased
from alignment.pipeline.remote.object_store import ObjectStore
from alignment.pipeline.remote.remote_checkpoints import (
    CheckpointUploads,
    RemoteCheckpoints,
    download_result,
    manifest_in,
    size_of,
    upload_result,
)

WAIT = "wait for it with --wait, or stop it"
"""What to do about a stage that another process works on."""


def with_results(plan: Plan, announce: Announce, *, stages: Sequence[PlannedStage], wait: bool) -> Plan:
    """The plan with the results of these stages on this machine that the store has. Raises Busy: another process works
    on such a stage here, and ``wait`` is False; ArtifactError: a result in the store is damaged; DiskError: there is no
    room for it; StoreError: the store cannot be reached or refuses."""
    waiting = [stage for stage in stages if stage.action is Action.fetch]
    if plan.store is None or not waiting:
        return plan
    for stage in waiting:
        stage.work.mkdir(parents=True, exist_ok=True)
        lock = stage.work / "lock"
        if wait and is_held(lock):
            announce(f"{stage.name}: another process is working on it; waiting")
        with held(lock, wait=wait, remedy=WAIT):
            if read_manifest(stage.artifact) is None:
                _download(plan.store, stage, announce)
            if read_manifest(stage.artifact) is not None:  # else its checkpoints are all that there is
                shutil.rmtree(stage.work, ignore_errors=True)
    return made_again(plan)


def set_damaged_aside(plan: Plan, announce: Announce, *, stages: Sequence[PlannedStage], wait: bool) -> None:
    """Moves damaged results of these stages away, so that they are made or downloaded again. Raises Busy: another
    process works on such a stage here, and ``wait`` is False."""
    for stage in stages:
        if stage.action is Action.reuse or read_manifest(stage.artifact) is None:
            continue
        with held(stage.work / "lock", wait=wait, remedy=WAIT):
            if not damage_of(stage.artifact, content=plan.verified):  # made again since the plan
                continue
            folder = aside(stage.artifact)
            shutil.rmtree(folder, ignore_errors=True)
            manifest = stage.artifact / MANIFEST
            manifest.rename(manifest.with_name(f"{MANIFEST}.damaged"))  # so that the folder counts as no result
            stage.artifact.rename(folder)
            announce(f"{stage.name}: {stage.artifact.name} is damaged, and was moved to {folder}")


@contextmanager
def of_stage(plan: Plan, stage: PlannedStage, announce: Announce, *, wait: bool) -> Iterator[bool]:
    """Holds the lease of a stage while the block makes its result; yields whether it has to, or another machine has
    made it. The work folder continues from the newest checkpoint; new ones and the result are uploaded. The caller
    holds the lock of the stage. Raises Busy: another machine works on it, and ``wait`` is False; ArtifactError: the
    stored result is damaged; DiskError: there is no room; StoreError: the store cannot be reached or refuses."""
    store = plan.store
    if store is None:
        yield True
        return

    def announce_of_stage(text: str) -> None:
        announce(f"{stage.name}: {text}")

    checkpoints = RemoteCheckpoints(store, stage.fingerprint)
    with leased(store, checkpoints.folder, work=stage.work, wait=wait, announce=announce_of_stage) as lease:
        if _download(store, stage, announce):
            checkpoints.remove()
            yield False
            return
        checkpoints.download_newest(stage.work, announce=announce_of_stage)
        with CheckpointUploads(checkpoints, stage.work, lease=lease, announce=announce_of_stage):
            yield True
        upload_result(store, stage.artifact, announce=announce_of_stage)
        if not lease.lost.is_set():
            checkpoints.remove()


def upload(plan: Plan, stage: PlannedStage, announce: Announce) -> None:
    """Uploads a complete result if the store lacks it, and removes checkpoints that a call left which was cut off.
    Raises ArtifactError: the result is damaged; StoreError: the store cannot be reached or refuses; the result stays
    here, and the next call uploads it."""
    if plan.store is not None:
        upload_result(plan.store, stage.artifact, announce=lambda text: announce(f"{stage.name}: {text}"))
        RemoteCheckpoints(plan.store, stage.fingerprint).remove()


def _download(store: ObjectStore, stage: PlannedStage, announce: Announce) -> bool:
    manifest = manifest_in(store, stage.artifact.name, fingerprint=stage.fingerprint)
    if manifest is None:
        return False
    announce(f"{stage.name}: downloading {stage.artifact.name} ({size_of(manifest)}) from {store.url}")
    download_result(store, manifest, stage.artifact, stage.work)
    return True
