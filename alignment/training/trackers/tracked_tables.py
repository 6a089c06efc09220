"""Tables as files in the stage's folder of the run, from which ``align track`` sends them later."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignment.core.artifacts import Manifest
from alignment.core.files import write_text
from alignment.job import StageSpec
from alignment.records.training import readable_rows
from alignment.training.trackers.tracker import Cell, Row, Tracker


class TableFiles(Tracker):
    """Keeps what other trackers get and no other file has: ``<name>.jsonl``, a line for each row of a table."""

    def __init__(self, spec: StageSpec) -> None:
        self._folder = _folder(spec)

    def log(self, rows: Sequence[Row]) -> None:
        """Keeps nothing: steps are in ``metrics.jsonl``."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Replaces the table of this name."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n" for row in rows]
        write_text(self._folder / f"{name}.jsonl", "".join(lines))

    def result(self, manifest: Manifest, folder: Path) -> None:
        """Keeps nothing: the result is in its manifest."""

    def close(self, *, done: bool) -> None:
        """Does nothing: every table is written at once."""


def stored_tables(spec: StageSpec) -> dict[str, list[dict[str, Any]]]:
    """The rows of the tables that a stage has sent, by the table's name."""
    return {file.stem: readable_rows(file)[0] for file in sorted(_folder(spec).glob("*.jsonl"))}


def _folder(spec: StageSpec) -> Path:
    """The folder of these settings, apart from that of others with which the run was started earlier."""
    return spec.run_folder / "tables" / spec.fingerprint[:8]
