"""The folder of a run that goes on, whose files a test changes as a driver and its workers do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.core.artifacts import write_json
from alignment.records.run import RunRecord, StageEntry
from alignment.records.worker import Progress

STAGES = {"sft": "base", "reward": "stage:sft", "dpo": "stage:sft", "ppo": "stage:reward"}
"""Each stage, which is of the kind of its name, and what it takes."""


class RunFolder:
    """``runs/mine`` under a folder, whose stages all wait at first."""

    def __init__(self, output: Path, name: str = "mine", **changes: Any) -> None:
        self.output = output
        self.folder = output / "runs" / name
        self.folder.mkdir(parents=True)
        stages = {
            stage: StageEntry(
                kind=stage,
                reason="no result yet",
                artifact=str(output / "artifacts" / f"{stage}-5f0e9b1c"),
                inputs={"init": source},
            )
            for stage, source in STAGES.items()
        }
        self.record = RunRecord(name=name, state="running", stages=stages, started="2026-11-28T13:00:00+00:00")
        self.run(**changes)

    def run(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)
        self.record.write(self.folder)

    def stage(self, name: str, state: str, **changes: Any) -> None:
        entry = replace(self.record.stages[name], state=state, **changes)
        self.run(stages={**self.record.stages, name: entry})

    def work(self, stage: str) -> Path:
        folder = self.output / "artifacts" / f"{stage}-5f0e9b1c.work"
        (folder / "content").mkdir(parents=True, exist_ok=True)
        return folder

    def progress(self, stage: str, phase: str, step: int = 0, total: int | None = None, **figures: float) -> None:
        Progress(phase=phase, step=step, total=total, figures=figures).write(self.work(stage))

    def steps(self, stage: str, *rows: dict[str, Any]) -> None:
        with (self.work(stage) / "content/metrics.jsonl").open("a") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)

    def status(self, stage: str, **fields: Any) -> None:
        (self.folder / stage).mkdir(exist_ok=True)
        write_json(self.folder / stage / "status.json", fields)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


pyte = pytest.importorskip("pyte", reason="a terminal is imitated by pyte, which is not installed")


class Terminal:
    """A terminal of so many columns and lines, with what has left it at the top."""

    def __init__(self, columns: int, lines: int = 24, *, translates: bool = False) -> None:
        self._screen = pyte.HistoryScreen(columns, lines, history=1000, ratio=0.5)
        self._stream = pyte.ByteStream(self._screen)
        if translates:  # as the driver of a real terminal makes of a line break
            self._screen.set_mode(pyte.modes.LNM)

    def feed(self, content: bytes) -> None:
        self._stream.feed(content)

    def resize(self, columns: int, lines: int = 24) -> None:
        self._screen.resize(lines, columns)

    @property
    def lines(self) -> list[str]:
        """Its lines without the empty ones at the end, and without spaces at their ends."""
        shown = [line.rstrip() for line in self._screen.display]
        while shown and not shown[-1]:
            shown.pop()
        return shown

    @property
    def shows_cursor(self) -> bool:
        return not self._screen.cursor.hidden

    @property
    def cursor(self) -> tuple[int, int]:
        return self._screen.cursor.x, self._screen.cursor.y
