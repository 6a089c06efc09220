"""Records of a run, of its attempts and of a stored checkpoint."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from alignment.core import typed_json
from alignment.core.errors import ArtifactError
from alignment.core.typed_json import Line, Name

FILE = "run.json"
COMPLETE = ("done", "reused")
"""States of a stage whose artifact can be relied on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageEntry:
    """A stage: ``waiting``, ``running``, ``done``, ``reused`` or ``failed``, and ``reason`` in words.

    ``artifact`` is a path, or the name of a folder. ``started`` is when the last attempt at the stage began, in UTC,
    ISO 8601. ``seconds`` is how long all its ``attempts`` took together, ``earlier_seconds`` those before the last one.
    ``inputs`` are references by the field that has them, one or several."""

    kind: Name = "unknown"
    state: Name = "waiting"
    reason: Annotated[str, Line(300)] = ""
    artifact: str = ""
    seconds: float | None = None
    started: Name = ""
    attempts: int = 1
    earlier_seconds: float = 0.0
    inputs: dict[Name, Name | list[Name] | dict[Name, Name]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether its artifact can be relied on."""
        return self.state in COMPLETE

    @property
    def references(self) -> list[tuple[str, str]]:
        """(field, reference) pairs; a field that holds several references gives several pairs."""
        pairs: list[tuple[str, str]] = []
        for name, value in self.inputs.items():
            several = list(value.values()) if isinstance(value, dict) else value
            pairs += [(name, ref) for ref in ([several] if isinstance(several, str) else several)]
        return pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """A run: ``running``, ``done``, ``gate not met``, ``failed``, ``preempted``, ``interrupted`` or ``waiting``.

    ``config`` is the configuration as plain data, ``profile`` the name of the profile that was applied, if any.
    ``cautions`` are the plan's notes that speak against its evaluations.
    ``started`` and ``finished`` are times in UTC, ISO 8601."""

    name: Name = ""
    recipe: Annotated[str, Line(400)] = ""
    overrides: list[str] = field(default_factory=list)
    profile: Name = ""
    config: dict[str, Any] = field(default_factory=dict)
    started: Name = ""
    finished: Name | None = None
    state: Name = ""
    stages: dict[str, StageEntry] = field(default_factory=dict)
    cautions: list[Annotated[str, Line(400)]] = field(default_factory=list)
    version: int = 1

    def settings_of(self, stage: str) -> dict[str, Any]:
        """The settings of a stage as plain data; empty where none are recorded."""
        stages = self.config.get("stages")
        settings = stages.get(stage) if isinstance(stages, dict) else None
        return settings if isinstance(settings, dict) else {}

    def write(self, run_folder: Path) -> None:
        """Replaces the file, so that a reader sees the old one or the new one."""
        typed_json.write(run_folder / FILE, self)

    @staticmethod
    def read(run_folder: Path) -> RunRecord:
        """The record of the run in this folder. Raises ArtifactError: there is none, it is damaged, or it was written
        by a newer version."""
        try:
            return typed_json.read(run_folder / FILE, RunRecord, remedy="start the run again to rewrite it")
        except FileNotFoundError:
            raise ArtifactError(
                "no run is recorded here", where=str(run_folder), remedy="start one: align run RECIPE"
            ) from None

    @staticmethod
    def read_if_any(run_folder: Path) -> RunRecord:
        """The record, or an empty one if there is none that can be read."""
        with suppress(ArtifactError):
            return RunRecord.read(run_folder)
        return RunRecord()


ATTEMPTS = "attempts.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempts:
    """Attempts at a stage: ``Attempts(number=2, earlier_seconds=184.2, started=1796000000.0)``.

    ``number`` counts the attempts, including the current one. ``earlier_seconds`` is the time of those that have ended.
    ``started`` is when the current one began, in seconds since 1970; 0 while none is running. ``without_progress``
    counts the last attempts that were stopped before they had stored anything."""

    number: int = 0
    earlier_seconds: float = 0.0
    started: float = 0.0
    without_progress: int = 0
    version: int = 1

    def write(self, work: Path) -> None:
        """Replaces the file. If the disk is full or the folder is gone, only the count is lost, not the stage."""
        with suppress(OSError):
            typed_json.write(work / ATTEMPTS, self)

    @staticmethod
    def read(work: Path) -> Attempts:
        """The attempts so far; no attempts if the file is missing or cannot be read."""
        with suppress(FileNotFoundError, ArtifactError):
            return typed_json.read(work / ATTEMPTS, Attempts, remedy="")
        return Attempts()


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
