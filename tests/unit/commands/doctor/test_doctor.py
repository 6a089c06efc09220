"""``align doctor``: the settings of a source on its command line, and the progress of a reading of many rows."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
from collections.abc import Iterator
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment import cli
from alignment.commands import doctor as doctor_verb
from alignment.commands.doctor import UNREAD, source_of
from alignment.commands.shared.diagnoses import RowProgress
from alignment.config.data import SourceConfig
from alignment.data import doctor
from alignment.data.reading import READ, written
from alignment.pipeline.plan.compose import tree_of
from tests.running import Clock

Captured = pytest.CaptureFixture[str]


def _file(folder: Path, *rows: Any) -> str:
    file = folder / "my rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(file)


def _command_in(text: str) -> list[str]:
    """The words of the command that a line of the output ends with, without ``align``."""
    (command,) = [line.split("align ")[1] for line in text.splitlines() if ": align doctor " in line]
    return shlex.split(command.split("; formats:")[0])


def test_every_setting_of_a_source_is_read_or_refused() -> None:
    assert {field.name for field in dataclasses.fields(SourceConfig)} == {"source", *READ, *UNREAD}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("colums={prompt: q}", "configuration: colums: unknown key; did you mean 'columns'?"),
        ("data.columns={prompt: q}", "configuration: data: unknown key; one of: source, split, "),
        ("columns=q", "configuration: columns: 'q' is not allowed; it takes names and texts"),
        ("columns={promt: a}", "columns.promt: no format has a column of this name; did you mean 'prompt'?"),
        ("split=3", "configuration: split: 3 is not allowed; it takes text"),
        ("split='${oc.env:HOME}'", "is not allowed: a configuration can only refer to itself"),
        ("source=b.jsonl", "configuration: source: the data is named already"),
        ("limit=3", "configuration: limit: has no effect"),
        ("format=prompt", "configuration: format: is also given as --format"),
        ("colums={a: b}; limit=3", "2 faults in the configuration"),
    ],
)
def test_a_wrong_setting_is_refused_as_in_a_recipe(
    tmp_path: Path, capsys: Captured, override: str, message: str
) -> None:
    file = _file(tmp_path, {"prompt": "a"})
    assert cli.main(["doctor", file, "--format", "kto", *override.split("; ")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("column", ["q", "my question", "größe", 'a "b" c', "null", "a.b-c", "3", "it's"])
def test_what_is_written_is_read_back(column: str) -> None:
    data = SourceConfig(columns={"prompt": column}, placeholders={"name": column}, format="prompt")
    given, faults = tree_of(written(data), example="")
    assert faults == []
    assert given == {"format": "prompt", "columns": {"prompt": column}, "placeholders": {"name": column}}
    assert source_of("", {}, written(data)) == data


def test_the_remedy_for_misspelt_columns_is_a_command_that_works(tmp_path: Path, capsys: Captured) -> None:
    file = _file(tmp_path, {"prompt": "a", "choosen": "b", "rejectd": "c"})
    assert cli.main(["doctor", file]) == 3
    words = _command_in(capsys.readouterr().out)
    assert words == ["doctor", file, "columns={chosen: choosen, rejected: rejectd}"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "misspelt?" not in printed
    assert "reward, dpo  1 pair\n" in printed
    setting = "'stages.dpo.data.columns={chosen: choosen, rejected: rejectd}'"
    assert f"  to use it    'stages.dpo.data.source=path:{file}' {setting}\n" in printed


def test_the_remedy_for_unknown_columns_is_a_command_to_fill_in(tmp_path: Path, capsys: Captured) -> None:
    file = _file(tmp_path, {"ask": "a", "good one": "b"})
    assert cli.main(["doctor", file, "placeholders={name: Ada}"]) == 3
    error = capsys.readouterr().err
    assert "no known format has the columns 'ask', 'good one'" in error
    words = _command_in(error)
    assert words == ["doctor", file, "columns={prompt: YOURS}", "placeholders={name: Ada}"]
    assert cli.main(["doctor", file, "columns={prompt: ask, completion: good one}"]) == 0
    assert "prompt_completion: " in capsys.readouterr().out


def test_a_placeholder_is_filled(tmp_path: Path, capsys: Captured) -> None:
    file = _file(tmp_path, {"prompt": "Who is {{name}}?", "completion": "Me."})
    assert cli.main(["doctor", file]) == 0
    assert "  unfilled     {{name}} in 1 row" in capsys.readouterr().out
    assert cli.main(["doctor", file, "placeholders={name: Ada}"]) == 0
    printed = capsys.readouterr().out
    assert "unfilled" not in printed
    assert "'stages.sft.data.placeholders={name: Ada}'" in printed


def _shown(*, terminal: bool, total: int | None, looks: list[tuple[float, int]]) -> str:
    clock = Clock()
    screen = StringIO()
    progress = RowProgress(Console(file=screen, width=100, force_terminal=terminal), lambda: total, clock)
    started = clock.now
    for seconds, rows in looks:
        clock.now = started + seconds
        progress(rows)
    progress.end()
    return screen.getvalue()


def test_without_a_terminal_there_is_a_line_every_half_minute_with_pace_and_time_left() -> None:
    looks = [(seconds, 2_560 * seconds) for seconds in range(1, 70)]
    assert _shown(terminal=False, total=10_000_000, looks=looks).splitlines() == [
        "7,680 of 10,000,000 rows, 2,560 rows/s, 1 h 05 min left",
        "84,480 of 10,000,000 rows, 2,560 rows/s, 1 h 04 min left",
        "161,280 of 10,000,000 rows, 2,560 rows/s, 1 h 04 min left",
    ]


def test_a_reading_of_a_few_seconds_shows_nothing_and_one_of_unknown_length_no_time() -> None:
    assert _shown(terminal=False, total=512, looks=[(1, 256), (2.9, 512)]) == ""
    assert _shown(terminal=True, total=512, looks=[(1, 256), (2.9, 512)]) == ""
    assert _shown(terminal=False, total=None, looks=[(4, 1_024)]) == "1,024 rows, 256 rows/s\n"


def test_on_a_terminal_one_line_is_replaced_and_removed() -> None:
    shown = _shown(terminal=True, total=2_048, looks=[(4, 1_024), (5, 1_280)])
    assert "1,280 of 2,048 rows, 256 rows/s, 3 s left" in shown
    assert "\x1b[2K" in shown.rpartition("left")[2], "the line is erased"


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_shows_what_is_known_of_the_rows_so_far_and_twice_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    file = _file(tmp_path, *({"prompt": f"{number}?", "completion": "Yes."} for number in range(9)))
    source_rows = doctor.source_rows

    def interrupted(*arguments: Any) -> Iterator[Any]:
        for number, row in enumerate(source_rows(*arguments), start=1):
            for _ in range(times if number == 5 else 0):
                os.kill(os.getpid(), signal.SIGINT)
            yield row

    monkeypatch.setattr(doctor, "source_rows", interrupted)
    screen = StringIO()
    before = signal.getsignal(signal.SIGINT)
    show = partial(doctor_verb.show_diagnosis, Console(file=screen, width=80), SourceConfig(source=file))
    if times == 2:
        with pytest.raises(KeyboardInterrupt):
            show()
        return
    assert show() == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "interrupted; of the first 5 rows:" in screen.getvalue()
    assert "sft          5 conversations" in screen.getvalue()
