"""``attempts.json`` in a stage's work folder: how often the stage was started, and how long that took.

The driver writes it when an attempt begins, and when one ends without a result. The work folder of a finished stage is
removed.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from alignment.core import typed_json
from alignment.core.errors import ArtifactError

FILE = "attempts.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempts:
    """Attempts at a stage: ``Attempts(number=2, earlier_seconds=184.2, started=1796000000.0)``.

    ``number`` counts the attempts, including the current one. ``earlier_seconds`` is the time of those that have ended.
    ``started`` is when the current one began, in seconds since 1970; 0 while none is running. ``without_progress``
    counts the last attempts that were stopped before they had stored anything.
    """

    number: int = 0
    earlier_seconds: float = 0.0
    started: float = 0.0
    without_progress: int = 0
    version: int = 1

    def write(self, work: Path) -> None:
        """Replaces the file. If the disk is full or the folder is gone, only the count is lost, not the stage."""
        with suppress(OSError):
            typed_json.write(work / FILE, self)

    @staticmethod
    def read(work: Path) -> Attempts:
        """The attempts so far; no attempts if the file is missing or cannot be read."""
        with suppress(FileNotFoundError, ArtifactError):
            return typed_json.read(work / FILE, Attempts, remedy="")
        return Attempts()
