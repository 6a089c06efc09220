"""The reference in docs/ says what the code says, and changes with it."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from typing import Annotated

import pytest

from alignment import cli
from alignment.config.optim import OptimConfig
from alignment.config.rules import POSITIVE
from alignment.config.typed import field_types
from alignment.core.errors import DataError
from alignment.stages.dpo.kind import DpoConfig
from book import command_line, errors_page
from book.reference import DOCS, pages, stale
from book.settings_pages import classes_below, kind_page, our_kinds
from book.settings_table import section

PAGES = pages()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_that_of_the_code(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name], "`make reference` writes it anew"


def test_no_page_is_left_of_something_that_is_gone() -> None:
    assert stale() == []


@pytest.mark.parametrize("kind", our_kinds())
def test_every_setting_of_a_kind_has_a_row(kind: str) -> None:
    text = PAGES[kind_page(kind)] + PAGES["reference/configuration/groups.md"]
    for cls in classes_below(our_kinds()[kind].config):
        for name, hint in field_types(cls).items():
            assert re.search(rf"^\| `{name}`( °)? \|", text, re.MULTILINE) or (name == "kind" and hint is str)


@pytest.mark.parametrize(
    ("page", "row"),
    [
        ("dpo", "| `beta` | `0.1` | number, above 0 |"),
        ("dpo", "| `init` ° | `stage:sft` | reference to a policy: `base`, `stage:NAME`, `path:FOLDER` |"),
        ("dpo", "| `optim` | `lr: 5e-05` | [Optim](groups.md#optim) |"),
        ("ppo", "| `scorers` | `[{}]` | list of [Scorer](groups.md#scorer), at least one entry |"),
        ("evaluate", "| `kind` | `none` | `none`, `metric`, `reward`, `endpoint`, `people` |"),
        ("groups", "| `lr` | required | number, above 0 |"),
    ],
)
def test_a_row_has_default_and_allowed_values(page: str, row: str) -> None:
    assert row in PAGES[kind_page(page)].splitlines()


@dataclass(kw_only=True, slots=True)
class OtherDefaults(DpoConfig):
    beta: Annotated[float, POSITIVE] = 0.7
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1.0, epochs=3.0))


def test_another_default_makes_another_page() -> None:
    text = section(OtherDefaults, heading="## Settings", link=lambda cls: cls.__name__)
    assert "| `beta` | `0.7` | number, above 0 |" in text
    assert "| `optim` | `lr: 1.0`, `epochs: 3.0` | OptimConfig |" in text


def test_another_option_makes_another_page(monkeypatch: pytest.MonkeyPatch) -> None:
    verb = cli.load("run")
    declare = verb.add_arguments

    def more(parser: argparse.ArgumentParser) -> None:
        declare(parser)
        parser.add_argument("--times", type=int, default=2, metavar="N", help="how often")

    monkeypatch.setattr(verb, "add_arguments", more)
    assert "| `--times N` | how often; default: 2 |" in command_line.page()


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_argument_of_a_verb_is_listed(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse([verb, "--help"])
    options = set(re.findall(r"^ +(?:-\w, )?(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)) - {"--help"}
    own = PAGES["reference/command_line.md"].partition(f"\n## align {verb}\n")[2].partition("\n## ")[0]
    assert options == set(re.findall(r"^\| `(--[a-z-]+)", own, re.MULTILINE))


def test_another_exit_code_makes_another_page(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "| 3 | A data file or row that cannot be used. |" in errors_page.page()
    monkeypatch.setattr(DataError, "exit_code", 33)
    assert "| 33 | A data file or row that cannot be used. |" in errors_page.page()


def test_all_lists_of_exit_codes_agree() -> None:
    of_the_code = set(errors_page.exit_codes())
    running = (DOCS / "running.md").read_text(encoding="utf-8").partition("## Exit codes")[2].partition("## ")[0]
    help_text = cli._parser([]).format_help().partition("exit codes: ")[2]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", running, re.MULTILINE)} == of_the_code
    assert {int(code) for code in re.findall(r"\b(\d+) [a-z]", help_text)} == of_the_code
