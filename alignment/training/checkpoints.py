"""Verified checkpoints: a manifest with sizes and hashes is written last, and only checkpoints that match are used.
transformers takes the newest ``checkpoint-N``, complete or not. Here a folder without a manifest is unfinished and is
removed. A folder whose files differ from its manifest is renamed to ``quarantine-…``, and the next older one is
used."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from alignment.core.artifacts import inside, write_json
from alignment.core.errors import ArtifactError
from alignment.core.files import parse_json
from alignment.core.fingerprint import file_sha256
from alignment.core.model_files import fits

log = logging.getLogger(__name__)
MANIFEST = "alignment_checkpoint.json"
NUM_STORED = 2
WHOLE = "whole weights"
"""The layout from which any number of processes can continue."""


def seal(checkpoint: Path, *, fingerprint: str, layout: str = WHOLE) -> None:
    """Writes the manifest of a finished checkpoint, which makes it valid. ``layout`` describes how weights are
    stored."""
    files = {
        path.relative_to(checkpoint).as_posix(): {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path != checkpoint / MANIFEST
    }
    write_json(checkpoint / MANIFEST, {"fingerprint": fingerprint, "layout": layout, "files": files})


def layout_of(checkpoint: Path) -> str:
    """The layout of the weights in a sealed checkpoint."""
    return str(parse_json((checkpoint / MANIFEST).read_text(encoding="utf-8")).get("layout", WHOLE))


def newest(folder: Path, *, fingerprint: str) -> Path | None:
    """The newest checkpoint of this stage that verifies, or None; damaged ones are renamed, which is logged. Raises
    OSError: a checkpoint cannot be read now, which says nothing of its content."""
    discard_unfinished(folder)
    for checkpoint in _by_step(folder):
        if _verifies(checkpoint, fingerprint):
            return checkpoint
        aside = checkpoint.with_name(f"quarantine-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        log.warning("%s is damaged or of another stage; it was set aside as %s", checkpoint.name, aside.name)
    return None


def discard_unfinished(folder: Path) -> None:
    """Removes unsealed checkpoints, left by a process that was killed or by a full disk."""
    for checkpoint in _by_step(folder):
        if not (checkpoint / MANIFEST).exists():
            shutil.rmtree(checkpoint, ignore_errors=True)


def rotate(folder: Path) -> None:
    """Keeps the newest sealed checkpoints and removes older ones."""
    sealed = [checkpoint for checkpoint in _by_step(folder) if (checkpoint / MANIFEST).exists()]
    for checkpoint in sealed[NUM_STORED:]:
        shutil.rmtree(checkpoint)


def step_of(checkpoint: Path) -> int:
    """The optimiser step of ``checkpoint-N``."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def _by_step(folder: Path) -> list[Path]:
    folders = [path for path in folder.glob("checkpoint-*") if path.name.rsplit("-", 1)[1].isdigit()]
    return sorted(folders, key=step_of, reverse=True)


def _verifies(checkpoint: Path, fingerprint: str) -> bool:
    try:
        manifest = parse_json((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        owner, files = manifest["fingerprint"], manifest["files"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    if owner != fingerprint or not files or not fits(files, dict[str, dict[str, Any]]):
        return False
    try:
        return all(_is_as_listed(inside(checkpoint, name), expected) for name, expected in files.items())
    except ArtifactError:
        return False


def _is_as_listed(path: Path, expected: dict[str, Any]) -> bool:
    return (
        path.is_file() and path.stat().st_size == expected.get("size") and file_sha256(path) == expected.get("sha256")
    )
