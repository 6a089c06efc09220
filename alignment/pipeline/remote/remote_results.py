"""Finished artifacts in a store: ``artifacts/<stage>-<8 hex>/``, with ``manifest.json`` as the last object."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from alignment.core.artifacts import MANIFEST, Manifest, parse_manifest, read_manifest, verify
from alignment.core.errors import ArtifactError
from alignment.core.files import flush, in_units, write_text
from alignment.pipeline.remote.file_transfer import download_files, upload_files
from alignment.pipeline.remote.object_store import ObjectStore

DOWNLOAD = "download"
"""The folder in a stage's work folder in which a result arrives."""


def manifest_in(store: ObjectStore, artifact: str, *, fingerprint: str) -> Manifest | None:
    """The manifest of a complete result, by its folder's name, or None if the store has none.

    Raises:
        ArtifactError: it is unreadable, lists no files, or belongs to another result.
        StoreError: the store cannot be reached or refuses.
    """
    content = store.read(f"{_base(artifact)}/{MANIFEST}")
    if content is None:
        return None
    folder = f"{store.url}/{_base(artifact)}"
    manifest = parse_manifest(content.decode(errors="replace"), folder=folder)
    if manifest.fingerprint != fingerprint:
        raise ArtifactError(
            "contains another result whose fingerprint starts with the same characters",
            where=folder,
            remedy="use another prefix",
        )
    if not manifest.files or any({"size", "sha256"} - set(listed) for listed in manifest.files.values()):
        raise ArtifactError(
            "does not list its files, so it cannot be verified", where=folder, remedy=f"delete {folder}"
        )
    return manifest


def download_result(store: ObjectStore, manifest: Manifest, artifact: Path, work: Path) -> None:
    """Makes the folder ``artifact`` of a result in the store. The caller holds the lock in ``work``.

    Raises:
        ArtifactError: a file is missing or damaged.
        DiskError: there is no room.
        StoreError: the store cannot be reached or refuses.
    """
    folder = work / DOWNLOAD
    download_files(store, _base(artifact.name), folder, manifest.files)
    write_text(folder / MANIFEST, _text(manifest), durable=True)
    verify(folder, content=False)
    flush(folder)
    shutil.rmtree(artifact, ignore_errors=True)  # it has no manifest
    os.replace(folder, artifact)
    flush(artifact.parent)


def upload_result(store: ObjectStore, artifact: Path, *, announce: Callable[[str], None]) -> None:
    """Uploads a complete result unless the store has it. If another machine completes it first, that one stays.

    Raises:
        ArtifactError: the result is not complete, or damaged.
        StoreError: the store cannot be reached or refuses.
    """
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
