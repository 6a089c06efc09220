"""Blocks of the pages do what they say; verbs, options, settings, choices and defaults that they name are there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from alignment.cli import VERBS
from alignment.config.run import recipe_names
from alignment.core import errors
from alignment.costs.devices import DEVICES
from tests.documented import prose, tables
from tests.documented.blocks import PAGES, ROOT, Block, all_blocks, name_of, spans, stray_comments
from tests.documented.blocks import prose as prose_of
from tests.documented.blocks import tables as tables_of
from tests.documented.checks import Captured, check
from tests.documented.conftest import Enter

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TABLES = [table for page in PAGES for table in tables_of(page) if table.settings]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_inside_prose_names_what_there_is(page: Path) -> None:
    assert [f"{span.id}: {fault}" for span in spans(page) for fault in prose.faults(span)] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_default_behind_a_setting_is_its_default(page: Path) -> None:
    lines = [(number, line) for number, line in prose_of(page) if not line.startswith("|")]
    assert [f"{number}: {fault}" for number, line in lines for fault in tables.default_faults(line)] == []


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.id)
def test_a_table_has_settings_that_exist_with_their_defaults_and_every_choice(table: tables.Table) -> None:
    assert list(tables.faults(table)) == []


def test_the_table_of_commands_has_every_verb_with_its_summary() -> None:
    (rows,) = [table.rows for table in tables_of(ROOT / "docs/running.md") if table.head[0] == "command"]
    shown = {verb: row[1] for row in rows for verb in re.findall(r"`align ([a-z-]+)", row[0])}
    assert set(shown) == set(VERBS)
    begins = {verb: summary.split()[0] for verb, summary in VERBS.items()}
    assert {verb: summary.split()[0] for verb, summary in shown.items()} == begins


def test_the_table_of_exit_codes_is_that_of_the_errors() -> None:
    (rows,) = [table.rows for table in tables_of(ROOT / "docs/running.md") if table.head[0] == "code"]
    every = [value for value in vars(errors).values() if isinstance(value, type)]
    codes = {error.exit_code for error in every if issubclass(error, errors.AlignmentError)}
    assert [int(row[0]) for row in rows] == sorted({0, *codes, errors.PREEMPTED, 130})


def test_the_tables_of_recipes_have_every_shipped_one() -> None:
    shown = [
        name
        for table in tables_of(ROOT / "docs/recipes.md")
        if table.head[1:] == ["what it is"]
        for row in table.rows
        for name in re.findall(r"`([^`]+)`", row[0])
    ]
    assert sorted(shown) == recipe_names()


def test_the_devices_of_a_plan_are_all_named() -> None:
    (row,) = [row for table in tables_of(ROOT / "docs/costs.md") for row in table.rows if "--device" in row[0]]
    assert set(re.findall(r"`([\w-]+)`", row[1])) | {row[0].split()[-1].strip("`")} == set(DEVICES)


def test_what_pip_is_told_to_install_is_what_the_package_asks_for() -> None:
    extras = PROJECT["optional-dependencies"]
    asked = {requirement for extra in extras.values() for requirement in extra} | set(PROJECT["dependencies"])
    texts = [block.text for block in all_blocks()] + [span.text for page in PAGES for span in spans(page)]
    installed = {match for text in texts for match in re.findall(r"pip install '([^']+)'", text)}
    assert len(installed) > 3
    for requirement in installed:
        name, _, extra = requirement.rstrip("]").partition("[")
        assert extra in extras if name == PROJECT["name"] else requirement in asked, requirement


BLOCKS = all_blocks()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.id)
def test_a_block_is_as_the_page_says(block: Block, enter: Enter, capsys: Captured) -> None:
    enter(block.page)
    check(block, capsys)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_comment_stands_before_what_it_is_about(page: Path) -> None:
    assert stray_comments(page) == []
