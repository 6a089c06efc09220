"""Checkpoints in a store: ``checkpoints/<fingerprint>/``, files first and the list of them last.

A checkpoint is all of a stage's work folder that another machine needs to go on: the newest sealed checkpoint, stored
parts, logs of steps, replies of servers and the chosen size of micro-batches.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from alignment.core import typed_json
from alignment.core.errors import ArtifactError
from alignment.core.files import parse_json
from alignment.core.fingerprint import file_sha256
from alignment.pipeline.remote.file_transfer import download_files, keys_of, upload_files
from alignment.pipeline.remote.lease import OWN_FILE
from alignment.pipeline.remote.object_store import ObjectStore
from alignment.records.stored_checkpoint import StoredCheckpoint, StoredFile, as_listed
from alignment.records.worker import PARTS, PROGRESS, REPLIES

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
        """Makes the work folder go on from the newest checkpoint, unless it is as far already.

        A damaged checkpoint is announced, and the next older one is used.

        Raises:
            DiskError: there is no room.
        """
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

        Raises:
            ArtifactError: the stage removed the files meanwhile.
        """
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
            raise ArtifactError(
                "it disappeared before it was uploaded", where=str(error.filename), remedy=""
            ) from error
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
        """Collects the files of a checkpoint in a folder of their own, as they are now."""
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
        """The keys of their files."""
        return set().union(*(keys_of(self.folder, as_listed(checkpoint.files)) for checkpoint in checkpoints))


def _names(work: Path, here: LocalWork) -> Iterator[str]:
    """The files of a checkpoint, as paths in the work folder."""
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
    """Makes a hard link, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
