"""``run.json``: a run's settings and progress. The driver replaces the file after every change."""

from __future__ import annotations

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
    ``inputs`` are references by the field that has them, one or several.
    """

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
    ``started`` and ``finished`` are times in UTC, ISO 8601.
    """

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
        """The record of the run in this folder.

        Raises:
            ArtifactError: there is none, it is damaged, or it was written by a newer version.
        """
        try:
            return typed_json.read(run_folder / FILE, RunRecord, remedy="start the run again to rewrite it")
        except FileNotFoundError:
            raise ArtifactError(
                "no run is recorded here", where=str(run_folder), remedy="start one: align run RECIPE"
            ) from None
