"""The list of files of a checkpoint in a store, written last, so that half an upload never counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from alignment.core.typed_json import Name


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A file's bytes and their SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredCheckpoint:
    """A stage's work after ``step``, with the number of its stored ``parts`` and the bytes of servers' ``replies``;
    ``files`` are listed by their paths in the work folder.

    Example: ``StoredCheckpoint(fingerprint="91c0aa17…", step=40, parts=0, files={"checkpoints/checkpoint-40/…": …})``.
    """

    fingerprint: str
    step: int
    parts: int
    files: dict[str, StoredFile] = field(default_factory=dict)
    created: Name = ""
    replies: int = 0
    version: int = 1

    @property
    def progress(self) -> tuple[int, int, int]:
        """What orders checkpoints: a larger one is newer."""
        return self.step, self.parts, self.replies

    @property
    def label(self) -> str:
        """``checkpoint-40``, or ``3 stored parts``, or ``3 stored parts with servers' replies``."""
        label = f"checkpoint-{self.step}" if self.step else f"{self.parts} stored parts"
        return f"{label} with servers' replies" if self.replies else label


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseRecord:
    """Who is working on a stage: ``owner`` is a random name, and ``process`` runs on ``host``."""

    owner: str
    host: Name = ""
    process: int = 0
    version: int = 1


def as_listed(files: dict[str, StoredFile]) -> dict[str, dict[str, Any]]:
    """The files as a manifest lists them."""
    return {name: {"size": file.size, "sha256": file.sha256} for name, file in files.items()}
