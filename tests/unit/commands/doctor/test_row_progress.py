"""A reading of many rows shows how far it is, and what it knows is not lost when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment.commands import doctor as doctor_verb
from alignment.commands.shared.row_progress import RowProgress
from alignment.config.data import SourceConfig
from alignment.data import doctor


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def _shown(screen: StringIO, *, terminal: bool, total: int | None, looks: list[tuple[float, int]]) -> str:
    clock = Clock()
    progress = RowProgress(Console(file=screen, width=100, force_terminal=terminal), lambda: total, clock)
    for seconds, rows in looks:
        clock.now = 100.0 + seconds
        progress(rows)
    progress.end()
    return screen.getvalue()


def test_without_a_terminal_there_is_a_line_every_half_minute_with_pace_and_time_left() -> None:
    looks = [(seconds, 2_560 * seconds) for seconds in range(1, 70)]
    assert _shown(StringIO(), terminal=False, total=10_000_000, looks=looks).splitlines() == [
        "7,680 of 10,000,000 rows, 2,560 rows/s, 1 h 05 min left",
        "84,480 of 10,000,000 rows, 2,560 rows/s, 1 h 04 min left",
        "161,280 of 10,000,000 rows, 2,560 rows/s, 1 h 04 min left",
    ]


def test_a_reading_of_a_few_seconds_shows_nothing_and_one_of_unknown_length_no_time() -> None:
    assert _shown(StringIO(), terminal=False, total=512, looks=[(1, 256), (2.9, 512)]) == ""
    assert _shown(StringIO(), terminal=True, total=512, looks=[(1, 256), (2.9, 512)]) == ""
    assert _shown(StringIO(), terminal=False, total=None, looks=[(4, 1_024)]) == "1,024 rows, 256 rows/s\n"


def test_on_a_terminal_one_line_is_replaced_and_removed() -> None:
    shown = _shown(StringIO(), terminal=True, total=2_048, looks=[(4, 1_024), (5, 1_280)])
    assert "1,280 of 2,048 rows, 256 rows/s, 3 s left" in shown
    assert "\x1b[2K" in shown.rpartition("left")[2], "the line is erased"


def test_ctrl_c_shows_what_is_known_of_the_rows_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{number}?", "completion": "Yes."}) + "\n" for number in range(9)))
    source_rows = doctor.source_rows

    def interrupted(*arguments: Any) -> Iterator[Any]:
        for number, row in enumerate(source_rows(*arguments), start=1):
            if number == 5:
                os.kill(os.getpid(), signal.SIGINT)
            yield row

    monkeypatch.setattr(doctor, "source_rows", interrupted)
    screen = StringIO()
    before = signal.getsignal(signal.SIGINT)
    assert doctor_verb.show_diagnosis(Console(file=screen, width=80), SourceConfig(source=str(file))) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "interrupted; of the first 5 rows:" in screen.getvalue()
    assert "sft          5 conversations" in screen.getvalue()


def test_ctrl_c_twice_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')

    def interrupted(*_: Any) -> Iterator[Any]:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        yield from ()

    monkeypatch.setattr(doctor, "source_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        doctor_verb.show_diagnosis(Console(file=StringIO(), width=80), SourceConfig(source=str(file)))
