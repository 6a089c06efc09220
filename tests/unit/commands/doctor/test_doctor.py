"""The settings of a data source on the command line of `align doctor`."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from alignment import cli
from alignment.commands.doctor.source_settings import UNREAD, source_of
from alignment.config.data import SourceConfig
from alignment.core.errors import ConfigError
from alignment.data.written_settings import READ, written
from alignment.pipeline.plan.compose import tree_of

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
    ("overrides", "message"),
    [
        (["colums={prompt: q}"], "DATA.colums: unknown key; did you mean 'columns'?"),
        (["data.columns={prompt: q}"], "DATA.data: unknown key; one of: source, split, subset, format, columns, "),
        (["columns=q"], "DATA.columns: 'q' is not allowed; it takes names and texts, such as {name: text}"),
        (["split=3"], "DATA.split: 3 is not allowed; it takes text"),
        (["rows.jsonl"], "rows.jsonl: not an override; write key=value, such as columns={prompt: my_question}"),
        (["split='${oc.env:HOME}'"], "is not allowed: a configuration can only refer to itself"),
        (["source=b.jsonl"], "DATA.source: DATA is the source already; leave this out"),
        (["limit=3"], "DATA.limit: has no effect; doctor examines every row; leave it out"),
        (["format=prompt"], "DATA.format: is also given as --format; give one"),
    ],
)
def test_a_wrong_setting_is_refused_as_in_a_recipe(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        source_of("a.jsonl", {"format": "kto"}, overrides)
    assert message in str(caught.value)


def test_all_wrong_settings_are_refused_together(tmp_path: Path, capsys: Captured) -> None:
    file = _file(tmp_path, {"prompt": "a"})
    assert cli.main(["doctor", file, "colums={a: b}", "limit=3"]) == 2
    assert "2 faults in the configuration" in capsys.readouterr().err
    assert cli.main(["doctor", file, "columns={promt: a}"]) == 2
    message = "DATA.columns.promt: no format has a column of this name; did you mean 'prompt'?"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("column", ["q", "my question", "größe", 'a "b" c', "null", "a.b-c", "3", "it's"])
def test_what_is_written_is_read_back(column: str) -> None:
    data = SourceConfig(columns={"prompt": column}, placeholders={"name": column}, format="prompt")
    given, faults = tree_of(written(data), example="")
    assert (given, faults) == (
        {"format": "prompt", "columns": {"prompt": column}, "placeholders": {"name": column}},
        [],
    )
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
