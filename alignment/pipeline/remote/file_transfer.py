"""Files to and from a store. An object's key ends with the SHA-256 of its content.

So two uploads of one name never mix, an upload that broke off goes on where it was, and a file that is there already
is not sent again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from alignment.core.artifacts import inside
from alignment.core.errors import ArtifactError, DiskError
from alignment.core.files import in_units, remove_leftovers, replacing
from alignment.core.fingerprint import file_sha256
from alignment.pipeline.remote.object_store import ObjectStore

Listed = Mapping[str, Mapping[str, Any]]
"""Size and SHA-256 of files, by path, as a manifest lists them."""


def nothing(_: int) -> None:
    """Counts no bytes."""


def upload_files(
    store: ObjectStore, base: str, folder: Path, files: Listed, *, on_bytes: Callable[[int], None] = nothing
) -> None:
    """Uploads those of a folder's files that the store does not have under ``base`` yet.

    Raises:
        StoreError: the store cannot be reached or refuses.
        ArtifactError: a file is gone.
    """
    there = store.sizes(base)
    for name, listed in files.items():
        key = _key(base, name, listed)
        if there.get(key) != listed["size"]:
            store.upload(folder / name, key, on_bytes)


def download_files(store: ObjectStore, base: str, folder: Path, files: Listed) -> None:
    """Downloads those of the files that ``folder`` does not have yet, in order, and checks every one.

    Raises:
        ArtifactError: a file is missing in the store or differs from the list, or its path leads out of the folder.
        DiskError: there is no room for them.
        StoreError: the store cannot be reached or refuses.
    """
    missing = {name: listed for name, listed in files.items() if not _is_here(inside(folder, name), listed)}
    folder.mkdir(parents=True, exist_ok=True)
    for parent in {inside(folder, name).parent for name in files}:
        remove_leftovers(parent)  # of a download that was killed
    _refuse_without_room(folder, sum(listed["size"] for listed in missing.values()))
    for name, listed in missing.items():
        path = inside(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=True) as temporary:
            _download(store, _key(base, name, listed), temporary, listed)


def keys_of(base: str, files: Listed) -> set[str]:
    """The keys of the objects that hold these files."""
    return {_key(base, name, listed) for name, listed in files.items()}


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


def _refuse_without_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskError(
            f"{in_units(needed)} must be downloaded, but only {in_units(free)} are free",
            where=str(folder),
            remedy="free space and run again; files that are already here are not downloaded again",
        )
