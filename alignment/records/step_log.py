"""``metrics.jsonl`` and similar files: one line per step (in RL: update), none twice after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignment.core.files import naming, parse_json, write_text

METRICS = "metrics.jsonl"
TOKENS = "num_tokens"
"""The metric that counts the tokens that a stage has processed since it began, as TRL's trainers name it."""


class MetricsLog:
    """Appends steps to a file; lines after a step can be dropped when a stage continues from a checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes one step; non-finite numbers are written as they are (``NaN``), to be visible."""
        line = json.dumps({"step": step, **{key: rounded(value) for key, value in metrics.items()}})
        with naming(self._path), self._path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def keep_through(self, step: int) -> None:
        """Drops the lines after ``step``, including a half-written last line."""
        if not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n")
        lines_to_keep = [line for line in lines if _step_of(line) <= step]
        write_text(self._path, "".join(line + "\n" for line in lines_to_keep))

    def last(self) -> dict[str, Any]:
        """The newest step, or an empty dict."""
        return (self.rows() or [{}])[-1]

    def rows(self) -> list[dict[str, Any]]:
        """All steps in the file."""
        lines = self._path.read_text(encoding="utf-8").split("\n") if self._path.exists() else []
        return [parse_json(line) for line in lines if line]


def written_rows(path: Path) -> list[dict[str, Any]]:
    """The steps of a file to which a stage may be writing now: a line counts once it has ended.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not JSON.
    """
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    return [parse_json(line) for line in lines]


def readable_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of lines, and how many lines are not objects; a killed writer can leave half a line."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return [], 1
    rows = [_object(line) for line in lines if line.strip()]
    return [row for row in rows if row is not None], rows.count(None)


def _object(line: str) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _step_of(line: str) -> float:
    try:
        return float(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def rounded(value: Any) -> Any:
    """A value as the file has it: numbers with six significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value
