"""TensorBoard's event files in ``runs/<run>/<stage>/tensorboard``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from alignment.core.artifacts import Manifest
from alignment.job import StageSpec
from alignment.training.trackers.curve_names import RESULT, curve_name
from alignment.training.trackers.tracker import Cell, Row, Tracker, settings


class TensorBoardTracker(Tracker):
    """Scalars by step; settings, samples and tables as text. Repeated steps replace earlier ones."""

    def __init__(self, spec: StageSpec) -> None:
        self._folder = spec.run_folder / "tensorboard"
        self._settings = settings(spec)
        self._writer: Any = None
        self._step = 0

    def log(self, rows: Sequence[Row]) -> None:
        """Writes and flushes steps, so that a killed process loses no step before its checkpoint."""
        for row in rows:
            writer = self._opened(row.step)
            self._step = row.step
            for name, value in row.curves.items():
                writer.add_scalar(name, value, row.step, walltime=row.time)
        if self._writer is not None:
            self._writer.flush()

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Writes a table as Markdown, which TensorBoard renders."""
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
        self._opened(0).add_text(name, text, self._step)

    def result(self, manifest: Manifest, folder: Path) -> None:
        """Writes the headline metrics, under ``result/``, and the fingerprints of the inputs."""
        for name, value in manifest.metrics.items():
            self._opened(0).add_scalar(RESULT + curve_name(name), value, self._step)
        lineage = {"artifact": folder.name, "fingerprint": manifest.fingerprint, "inputs": manifest.inputs}
        self._opened(0).add_text("lineage", _block(lineage), self._step)

    def close(self, *, done: bool) -> None:
        """Flushes; event files cannot record how a stage ended."""
        if self._writer is not None:
            self._writer.close()

    def _opened(self, step: int) -> Any:
        """The writer. It is opened at this attempt's first step, and makes readers forget earlier events from there
        on."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step)
            self._writer.add_text("settings", _block(self._settings), step)
        return self._writer


def _cell(value: Cell) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")


def _block(value: Any) -> str:
    """YAML, indented as a code block of Markdown."""
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return "\n".join(f"    {line}" for line in text.splitlines())
