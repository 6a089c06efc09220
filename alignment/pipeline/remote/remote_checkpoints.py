"""Checkpoints and finished artifacts in a store, files first and the list of them last.

They are in ``checkpoints/<fingerprint>/`` and ``artifacts/<stage>-<8 hex>/``.

A checkpoint is all of a stage's work folder that another machine needs to go on: the newest sealed checkpoint, stored
parts, logs of steps, replies of servers and the chosen size of micro-batches.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from alignment.core import typed_json
from alignment.core.artifacts import MANIFEST, Manifest, inside, parse_manifest, read_manifest, verify
from alignment.core.errors import ArtifactError, DiskError, StoreError
from alignment.core.files import flush, in_units, parse_json, remove_leftovers, replacing, write_text
from alignment.core.fingerprint import file_sha256
from alignment.pipeline.remote.lease import OWN_FILE, Lease
from alignment.pipeline.remote.object_store import ObjectStore
from alignment.records.run import StoredCheckpoint, StoredFile, as_listed
from alignment.records.worker import PARTS, PROGRESS, REPLIES

Listed = Mapping[str, Mapping[str, Any]]
"""Size and SHA-256 of files, by path, as a manifest lists them."""


def nothing(_: int) -> None:
    """Counts no bytes."""


def upload_files(
    store: ObjectStore, base: str, folder: Path, files: Listed, *, on_bytes: Callable[[int], None] = nothing
) -> None:
    """Uploads those of a folder's files that the store does not have under ``base`` yet. Raises StoreError: the store
    cannot be reached or refuses; ArtifactError: a file is gone."""
    there = store.sizes(base)
    for name, listed in files.items():
        key = _key(base, name, listed)
        if there.get(key) != listed["size"]:
            store.upload(folder / name, key, on_bytes)


def download_files(store: ObjectStore, base: str, folder: Path, files: Listed) -> None:
    """Downloads those of the files that ``folder`` does not have yet, in order, and checks every one. Raises
    ArtifactError: a file is missing in the store or differs from the list, or its path leads out of the folder;
    DiskError: there is no room for them; StoreError: the store cannot be reached or refuses."""
    missing = {name: listed for name, listed in files.items() if not _is_here(inside(folder, name), listed)}
    folder.mkdir(parents=True, exist_ok=True)
    for parent in {inside(folder, name).parent for name in files}:
        remove_leftovers(parent)  # of a download that was killed
    needed, free = sum(listed["size"] for listed in missing.values()), shutil.disk_usage(folder).free
    if needed > free:
        message = f"{in_units(needed)} must be downloaded, but only {in_units(free)} are free"
        remedy = "free space and run again; files that are already here are not downloaded again"
        raise DiskError(message, where=str(folder), remedy=remedy)
    for name, listed in missing.items():
        path = inside(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=True) as temporary:
            _download(store, _key(base, name, listed), temporary, listed)


def _download(store: ObjectStore, key: str, file: Path, listed: Mapping[str, Any]) -> None:
    remedy = f"delete the objects under {store.url}/{key.rpartition('/')[0]}, and the list of them, to make them again"
    if not store.download(key, file):
        raise ArtifactError("missing in the store", where=f"{store.url}/{key}", remedy=remedy)
    if not _is_here(file, listed):
        raise ArtifactError("its content differs from its list", where=f"{store.url}/{key}", remedy=remedy)


def _is_here(path: Path, listed: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == listed["size"] and file_sha256(path) == listed["sha256"]


def _key(base: str, name: str, listed: Mapping[str, Any]) -> str:
    return f"{base}/{name}/{listed['sha256']}"


DOWNLOAD = "download"
"""The folder in a stage's work folder in which a result arrives."""


def manifest_in(store: ObjectStore, artifact: str, *, fingerprint: str) -> Manifest | None:
    """The manifest of a complete result, by its folder's name, or None if the store has none. Raises ArtifactError: it
    is unreadable, lists no files, or belongs to another result; StoreError: the store cannot be reached or refuses."""
    content = store.read(f"{_base(artifact)}/{MANIFEST}")
    if content is None:
        return None
    folder = f"{store.url}/{_base(artifact)}"
    manifest = parse_manifest(content.decode(errors="replace"), folder=folder)
    if manifest.fingerprint != fingerprint:
        message = "contains another result whose fingerprint starts with the same characters"
        raise ArtifactError(message, where=folder, remedy="use another prefix")
    if not manifest.files or any({"size", "sha256"} - set(listed) for listed in manifest.files.values()):
        message = "does not list its files, so it cannot be verified"
        raise ArtifactError(message, where=folder, remedy=f"delete {folder}")
    return manifest


def download_result(store: ObjectStore, manifest: Manifest, artifact: Path, work: Path) -> None:
    """Makes the folder ``artifact`` of a result in the store. The caller holds the lock in ``work``. Raises
    ArtifactError: a file is missing or damaged; DiskError: there is no room; StoreError: the store cannot be reached or
    refuses."""
    folder = work / DOWNLOAD
    download_files(store, _base(artifact.name), folder, manifest.files)
    write_text(folder / MANIFEST, _text(manifest), durable=True)
    verify(folder, content=False)
    flush(folder)
    shutil.rmtree(artifact, ignore_errors=True)  # it has no manifest
    os.replace(folder, artifact)
    flush(artifact.parent)


def upload_result(store: ObjectStore, artifact: Path, *, announce: Callable[[str], None]) -> None:
    """Uploads a complete result unless the store has it. If another machine completes it first, that one stays. Raises
    ArtifactError: the result is not complete, or damaged; StoreError: the store cannot be reached or refuses."""
    written = read_manifest(artifact)
    if written is not None and manifest_in(store, artifact.name, fingerprint=written.fingerprint) is not None:
        return
    manifest = verify(artifact, content=True)
    announce(f"uploading {artifact.name} ({size_of(manifest)}) to {store.url}")
    upload_files(store, _base(artifact.name), artifact, manifest.files)
    store.create(f"{_base(artifact.name)}/{MANIFEST}", _text(manifest).encode())


def size_of(manifest: Manifest) -> str:
    """The size of a result's files in words."""
    return in_units(sum(listed["size"] for listed in manifest.files.values()))


def _base(artifact: str) -> str:
    return f"artifacts/{artifact}"


def _text(manifest: Manifest) -> str:
    return json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False) + "\n"


CHECKPOINT_MANIFEST = "alignment_checkpoint.json"
"""The last file that ``alignment.training.checkpoints`` writes into a checkpoint; without it, a folder is ignored."""
STAGED = "upload"
"""The folder in a stage's work folder with what is being uploaded, which the stage may remove meanwhile."""
NUM_STORED = 2
_FOLDER = "checkpoints"
_LIST = re.compile(r"\d{8}-\d{6}(-\d{12})?\.json")
_NOT_WORK = frozenset({PROGRESS, OWN_FILE})


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalWork:
    """How far the work folder is: the ``newest`` sealed checkpoint, its step, the number of stored parts, and the bytes
    of servers' replies."""

    newest: Path | None
    step: int
    parts: int
    replies: int

    @property
    def progress(self) -> tuple[int, int, int]:
        """What orders checkpoints: a larger one is newer."""
        return self.step, self.parts, self.replies


def local_work(work: Path) -> LocalWork:
    """How far an unfinished stage is on this machine. The worker verifies a checkpoint before it continues from it."""
    sealed = [manifest.parent for manifest in (work / _FOLDER).glob(f"checkpoint-*/{CHECKPOINT_MANIFEST}")]
    newest = max(sealed, key=_step, default=None)
    parts = sum(1 for _ in (work / _FOLDER).glob(PARTS))
    replies = sum(_size(file) for pattern in REPLIES for file in work.glob(pattern))
    return LocalWork(newest=newest, step=0 if newest is None else _step(newest), parts=parts, replies=replies)


class RemoteCheckpoints:
    """The checkpoints of one stage in a store. All methods raise StoreError if that cannot be reached or refuses."""

    def __init__(self, store: ObjectStore, fingerprint: str) -> None:
        self.folder = f"{_FOLDER}/{fingerprint}"
        self._store = store
        self._stage = fingerprint

    def complete(self) -> list[StoredCheckpoint]:
        """The complete checkpoints, newest first; a list that cannot be read does not count."""
        keys = [key for key in self._store.sizes(self.folder) if _LIST.fullmatch(key.rpartition("/")[2])]
        depth = self.folder.count("/") + 1
        read = [self._read(key) for key in keys if key.count("/") == depth]
        return sorted((item for item in read if item is not None), key=lambda item: item.progress, reverse=True)

    def download_newest(self, work: Path, *, announce: Callable[[str], None]) -> None:
        """Makes the work folder go on from the newest checkpoint, unless it is as far already. A damaged checkpoint is
        announced, and the next older one is used. Raises DiskError: there is no room."""
        for checkpoint in self.complete():
            if checkpoint.progress <= local_work(work).progress:
                return
            try:
                download_files(self._store, self.folder, work, _sealed_last(checkpoint))
            except ArtifactError as damage:
                announce(f"{checkpoint.label} in {self._store.url} cannot be used: {damage.where}: {damage.message}")
                continue
            announce(f"{checkpoint.label} was downloaded from {self._store.url}")
            return

    def upload_newest(self, work: Path, *, on_bytes: Callable[[int], None]) -> StoredCheckpoint | None:
        """Uploads how far the work folder is, and removes older checkpoints; None if the store is as far already.
        Raises ArtifactError: the stage removed the files meanwhile."""
        stored = self.complete()
        here = local_work(work)
        if here.progress <= max((checkpoint.progress for checkpoint in stored), default=(0, 0, 0)):
            return None
        staged = work / STAGED
        shutil.rmtree(staged, ignore_errors=True)
        try:
            checkpoint = self._staged(work, here, staged)
            upload_files(self._store, self.folder, staged, as_listed(checkpoint.files), on_bytes=on_bytes)
        except FileNotFoundError as error:
            gone = "it disappeared before it was uploaded"
            raise ArtifactError(gone, where=str(error.filename), remedy="") from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        self._store.write(self._key(checkpoint), json.dumps(typed_json.to_json(checkpoint)).encode())
        self._rotate([checkpoint, *stored])
        return checkpoint

    def remove(self) -> None:
        """Removes all checkpoints, and the lease with them: the stage is done."""
        for key in sorted(self._store.sizes(self.folder), key=lambda key: not key.endswith(".json")):
            self._store.delete(key)

    def _read(self, key: str) -> StoredCheckpoint | None:
        content = self._store.read(key)
        try:
            raw = parse_json(content or b"")
            checkpoint = typed_json.strict(raw, StoredCheckpoint, where=f"{self._store.url}/{key}", remedy="")
        except (ValueError, ArtifactError):
            return None
        return checkpoint if checkpoint.fingerprint == self._stage and checkpoint.files else None

    def _staged(self, work: Path, here: LocalWork, staged: Path) -> StoredCheckpoint:
        files = {}
        for name in _names(work, here):
            target = staged / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if here.newest is not None and (work / name).is_relative_to(here.newest):
                _link(work / name, target)  # a sealed file does not change
            else:
                shutil.copyfile(work / name, target)
            files[name] = StoredFile(size=target.stat().st_size, sha256=file_sha256(target))
        return StoredCheckpoint(
            fingerprint=self._stage,
            step=here.step,
            parts=here.parts,
            replies=here.replies,
            files=files,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _key(self, checkpoint: StoredCheckpoint) -> str:
        replies = f"-{checkpoint.replies:012d}" if checkpoint.replies else ""
        return f"{self.folder}/{checkpoint.step:08d}-{checkpoint.parts:06d}{replies}.json"

    def _rotate(self, newest_first: list[StoredCheckpoint]) -> None:
        """Removes the lists of older checkpoints, then the files that only they name. Of lists that differ in servers'
        replies alone, the newest stays."""
        newest: dict[tuple[int, int], StoredCheckpoint] = {}
        for checkpoint in newest_first:
            newest.setdefault((checkpoint.step, checkpoint.parts), checkpoint)
        stays = list(newest.values())[:NUM_STORED]
        older = [checkpoint for checkpoint in newest_first if checkpoint not in stays]
        for checkpoint in older:
            self._store.delete(self._key(checkpoint))
        for key in self._objects(older) - self._objects(stays):
            self._store.delete(key)

    def _objects(self, checkpoints: list[StoredCheckpoint]) -> set[str]:
        files = [item for checkpoint in checkpoints for item in as_listed(checkpoint.files).items()]
        return {_key(self.folder, name, listed) for name, listed in files}


def _names(work: Path, here: LocalWork) -> Iterator[str]:
    patterns = ("*.json", "*.jsonl", "*/*.jsonl", f"{_FOLDER}/{PARTS}")
    paths = [path for pattern in patterns for path in work.glob(pattern) if path.name not in _NOT_WORK]
    paths += [] if here.newest is None else list(here.newest.rglob("*"))
    for path in sorted(set(paths)):
        hidden = path.name.startswith(".")  # a temporary file
        if path.is_file() and not hidden and STAGED not in path.relative_to(work).parts[:1]:
            yield path.relative_to(work).as_posix()


def _sealed_last(checkpoint: StoredCheckpoint) -> dict[str, dict[str, object]]:
    """The files in an order in which half a download does not count: logs, weights, and the manifest that seals."""
    listed = as_listed(checkpoint.files)
    return dict(sorted(listed.items(), key=lambda item: (Path(item[0]).name == CHECKPOINT_MANIFEST, item[0])))


def _size(file: Path) -> int:
    """Bytes of a file; 0 if the stage has removed it meanwhile."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)


_LOOK_SECONDS = 1.0
_AFTER_FAULT_SECONDS = 30.0
_REPLIES_SECONDS = 30.0
"""How long replies of servers wait for an upload while they are all that is new."""


class _Ended(Exception):
    """The stage has ended, so the upload of a checkpoint is no longer needed."""


class CheckpointUploads:
    """While the block runs, each new checkpoint is uploaded. If the block fails, the last one is uploaded before the
    error goes on; if it ends well, the result makes them superfluous. A fault of the store does not end the stage: it
    is announced once, and the upload is tried again later."""

    def __init__(
        self, checkpoints: RemoteCheckpoints, work: Path, *, lease: Lease, announce: Callable[[str], None]
    ) -> None:
        self._checkpoints, self._work, self._lease, self._announce = checkpoints, work, lease, announce
        self._uploaded = (0, 0, 0)
        self._uploaded_at = 0.0
        self._ends = threading.Event()
        self._fault = ""
        self._thread = threading.Thread(target=self._upload_all, daemon=True)

    def __enter__(self) -> CheckpointUploads:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._ends.set()
        self._thread.join()
        if kind is not None and not self._lease.lost.is_set():
            self._upload(nothing)

    def _upload_all(self) -> None:
        while not self._ends.wait(_LOOK_SECONDS):
            if self._lease.lost.is_set():
                taken = "another machine has taken over the stage"
                self._announce(f"{taken}, so checkpoints from here are no longer uploaded")
                return
            try:
                if not self._upload(self._refuse_after_end):
                    self._ends.wait(_AFTER_FAULT_SECONDS)
            except _Ended:
                return

    def _upload(self, on_bytes: Callable[[int], None]) -> bool:
        here, started = local_work(self._work).progress, time.monotonic()
        if here <= self._uploaded:
            return True
        are_only_replies = here[:2] == self._uploaded[:2]
        if are_only_replies and not self._ends.is_set() and started < self._uploaded_at + _REPLIES_SECONDS:
            return True
        try:
            checkpoint = self._checkpoints.upload_newest(self._work, on_bytes=on_bytes)
        except ArtifactError:  # the stage has removed it, so there is a newer one or the result
            return True
        except (StoreError, OSError) as fault:
            reason = fault.message if isinstance(fault, StoreError) else str(fault)
            if reason != self._fault:
                self._announce(f"a checkpoint could not be uploaded; this will be tried again: {reason}")
            self._fault = reason
            return False
        self._fault = ""
        self._uploaded, self._uploaded_at = here if checkpoint is None else checkpoint.progress, started
        if checkpoint is not None and not are_only_replies:
            self._announce(f"{checkpoint.label} was uploaded in {time.monotonic() - started:.1f} s")
        return True

    def _refuse_after_end(self, _: int) -> None:
        if self._ends.is_set():
            raise _Ended
