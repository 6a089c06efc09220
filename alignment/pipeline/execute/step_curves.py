"""The curve and the speed of a running stage, from the lines of its metrics.jsonl as they are written."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from alignment.core.files import parse_json
from alignment.records.step_log import TOKENS
from alignment.report.kit.text import finite

TokensOfLine = Callable[[Mapping[str, Any]], float | None]
_RECENT = 20
"""Lines over which tokens are counted, so that a stage's slow first step counts no longer than it has to."""


@dataclass(kw_only=True, slots=True)
class StepCurve:
    """The values of one metric, step by step, and the time and tokens of these steps.

    A line without the metric has no value. ``num_tokens`` is how many tokens the lines count. ``recent`` are (seconds,
    tokens) since the stage began, of the last lines; ``first`` and ``last`` are (step, seconds) of the first and the
    last line.
    """

    values: list[float] = field(default_factory=list)
    num_tokens: float = 0.0
    recent: list[tuple[float, float]] = field(default_factory=list)
    first: tuple[int, float] | None = None
    last: tuple[int, float] | None = None

    def add(self, row: dict[str, Any], metric: str, tokens_of_line: TokensOfLine) -> None:
        """Adds a line; one that has no count of all tokens so far adds its own."""
        step, seconds, tokens = (finite(row.get(name)) for name in ("step", "seconds", TOKENS))
        if tokens is None and (own := tokens_of_line(row)) is not None:
            tokens = self.num_tokens + own
        if metric in row:
            value = finite(row[metric])
            self.values.append(math.nan if value is None else value)
        if step is not None and seconds is not None:
            self.last = (int(step), seconds)
            self.first = self.first or self.last
        if seconds is not None and tokens is not None:
            self.num_tokens = tokens
            self.recent = [*self.recent[1 - _RECENT :], (seconds, tokens)]

    def tokens_per_second(self) -> float | None:
        """Over the last steps; None before two steps have counted tokens."""
        if len(self.recent) < 2:
            return None
        (start, before), (end, after) = self.recent[0], self.recent[-1]
        return (after - before) / (end - start) if end > start and after >= before else None


class CurveFile:
    """Reads the lines that are added to a file; one that was shortened or replaced is read again from its start."""

    def __init__(self, path: Path, metric: str, tokens_of_line: TokensOfLine) -> None:
        self._path = path
        self._metric = metric
        self._tokens_of_line = tokens_of_line
        self._read = 0
        self._inode = 0
        self._unfinished = b""
        self.curve = StepCurve()

    def look(self) -> StepCurve:
        """The curve as far as it is written; a line counts once it has ended, and one that is not JSON does not."""
        try:
            with self._path.open("rb") as stream:
                self._take_in(stream)
        except OSError:  # not there yet, or not for a moment (ESTALE)
            pass
        return self.curve

    def _take_in(self, stream: BinaryIO) -> None:
        status = os.fstat(stream.fileno())
        if status.st_ino != self._inode or status.st_size < self._read:
            self._inode, self._read, self._unfinished, self.curve = status.st_ino, 0, b"", StepCurve()
        stream.seek(self._read)
        added = stream.read()
        self._read += len(added)
        *lines, self._unfinished = (self._unfinished + added).split(b"\n")
        for line in lines:
            if (row := _object(line)) is not None:
                self.curve.add(row, self._metric, self._tokens_of_line)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
