"""An artifact on disk: written to a temporary folder with the manifest last, flushed, then renamed in one step. A
folder with a manifest is complete; a folder without a manifest is ignored. ``manifest.json`` lists every file with its
size and SHA-256, so that damage is detected before anything is built on the artifact."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from alignment.core.errors import ArtifactError, StageError
from alignment.core.files import flush, parse_json, remove_leftovers, write_text
from alignment.core.fingerprint import file_sha256
from alignment.core.model_files import fits

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
"""The folder of a policy's tokenizer."""
SCHEMA = 1

POLICY = "policy"
REWARD_MODEL = "reward"
EVALUATION = "evaluation"
FORGETTING = "forgetting"
REWARD_CARD = "reward_card"
REPORT = "report"
ROWS = "rows"
"""Kinds of artifacts that more than one room knows; a kind of stage says which one it makes."""

FROM_OUTSIDE = "adapter"
"""The stage and the kind of stage that the manifest of an adapter from outside names, which no stage made."""

ROWS_FILE = "rows.jsonl"
"""The file of an artifact of kind ``ROWS`` that other stages read as data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What an artifact is and where it comes from. Example: ``Manifest(stage="dpo", kind="policy",
    fingerprint="91c0aa17…", config={…}, inputs={"init": "5f0e…"}, base={"source": "bundled:smollm2-135m", …},
    adapters=["adapters/0-sft", "adapters/1-dpo"], …)``. ``identity`` is the canonical form that was hashed, kept so
    that a plan can say what differs. ``base`` is the model that ``adapters`` are applied to, in order; ``base`` with
    ``"source": "self"`` is the artifact's own ``model/``. ``adapters_stood`` says how each adapter was applied when it
    was trained (``SavedAdapter`` in models/assembly). ``metrics`` are the headline metrics; ``usage`` holds seconds,
    peak memory in bytes, and the size of micro-batches if the stage chose it."""

    stage: str
    kind: str
    fingerprint: str
    identity: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    adapters: list[str] = field(default_factory=list)
    adapters_stood: dict[str, dict[str, bool]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    usage: dict[str, float] = field(default_factory=dict)
    tokenizer_sha256: str = ""
    chat_template_sha256: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    git_commit: str = ""
    created: str = ""
    schema: int = SCHEMA
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def folder_name(stage: str, fingerprint: str) -> str:
    """``dpo-91c0aa17``: readable name first, eight hexadecimal digits second."""
    return f"{stage}-{fingerprint[:8]}"


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it. If ``durable``, this holds even
    after a power cut. Several processes may write the same file at the same time, also from machines that share the
    folder."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", durable=durable)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as lines of JSON into a folder that is published as a whole."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def readable(folder: Path) -> None:
    """Makes the files of a folder readable for everybody; safetensors makes them readable for their owner only."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)


def publish(content: Path, target: Path, manifest: Manifest) -> Manifest:
    """Turns the folder ``content`` into the artifact ``target``; returns the manifest with its files listed. ``target``
    may exist only if it has no manifest (a leftover); then it is replaced. Raises ArtifactError: ``target`` is a
    complete artifact already; StageError: ``content`` has no file; ``verify`` would reject the artifact."""
    if (target / MANIFEST).exists():
        raise ArtifactError("this artifact exists and is complete", where=str(target), remedy="delete it to remake it")
    (content / MANIFEST).unlink(missing_ok=True)  # left by an attempt that was stopped before the rename
    for folder in (content, *(path for path in content.rglob("*") if path.is_dir())):
        remove_leftovers(folder)  # left by a process that was killed
    files = {}
    readable(content)
    for path in sorted(p for p in content.rglob("*") if p.is_file()):
        flush(path)
        files[path.relative_to(content).as_posix()] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    if not files:
        raise StageError(
            "the stage wrote no file, so its result could never be checked",
            remedy="write at least one file into context.content",
        )
    complete = dataclasses.replace(manifest, files=files)
    write_json(content / MANIFEST, dataclasses.asdict(complete))
    flush(content)
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(content, target)
    flush(target.parent)
    return complete


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a complete artifact, or None if there is no manifest. Raises ArtifactError: the manifest is
    unreadable, has another schema, or a field of it has the wrong type."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        if not path.is_file():
            raise ValueError("not a regular file")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"unreadable: {error}", where=str(path), remedy=f"delete {folder} to remake it") from error
    return parse_manifest(text, folder=str(folder))


def parse_manifest(text: str, *, folder: str) -> Manifest:
    """The manifest that a file of ``folder`` holds. Raises ArtifactError: it is unreadable, has another schema, or a
    field of it has the wrong type."""
    where, remedy = f"{folder}/{MANIFEST}", f"delete {folder} to remake it"
    try:
        content = parse_json(text)
        known = {field.name for field in dataclasses.fields(Manifest)}
        newer = sorted(set(content) - known)
        manifest = Manifest(**{name: value for name, value in content.items() if name in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(f"unreadable: {error}", where=where, remedy=remedy) from error
    if newer:
        raise ArtifactError(
            f"was written by a newer version of this program, which added {', '.join(newer)}",
            where=where,
            remedy="update this program, or choose another output=",
        )
    if manifest.schema != SCHEMA:
        raise ArtifactError(f"schema {manifest.schema}, expected {SCHEMA}", where=where, remedy=f"delete {folder}")
    for name, hint in get_type_hints(Manifest).items():
        if not fits(getattr(manifest, name), hint):
            raise ArtifactError(
                f"unreadable: '{name}' has the wrong type: {getattr(manifest, name)!r:.60}", where=where, remedy=remedy
            )
    return manifest


def verify(folder: Path, *, content: bool) -> Manifest:
    """Checks that every listed file exists with its size, and with its hash too if ``content``. Raises ArtifactError:
    the artifact is missing, incomplete or damaged, or lists no file; the message names the file."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise ArtifactError("no complete artifact here", where=str(folder), remedy="run the stage that makes it")
    if not manifest.files:
        where = str(folder / MANIFEST)
        raise ArtifactError("lists no files, so it cannot be checked", where=where, remedy=f"delete {folder}")
    for name, expected in manifest.files.items():
        path = inside(folder, name)
        if not path.is_file() or path.stat().st_size != expected.get("size"):
            raise ArtifactError("missing or cut short", where=str(path), remedy=f"delete {folder} to remake it")
        if content and file_sha256(path) != expected.get("sha256"):
            raise ArtifactError(
                "content differs from its manifest",
                where=str(path),
                remedy=f"run the recipe with --verify, or delete {folder}, to remake it",
            )
    return manifest


def inside(folder: Path, name: str) -> Path:
    """``folder / name`` for a file name from a manifest. Raises ArtifactError: the path is outside the folder."""
    path = folder / name
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
        path.is_file()
    except (OSError, ValueError) as error:  # too long, or with a zero byte
        raise ArtifactError(
            f"its manifest names an impossible file {name!r:.60}: {error!s:.80}",
            where=str(folder),
            remedy="do not use it",
        ) from error
    if not is_inside:
        raise ArtifactError(
            f"its manifest names a file outside the folder: {name!r}", where=str(folder), remedy="do not use it"
        )
    return path
