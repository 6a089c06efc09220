"""Every fenced block of README and docs: commands, recipes, rows, scripts and what is quoted of their output."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.documented.blocks import PAGES, Block, all_blocks, name_of, stray_comments
from tests.documented.checks import Captured, check
from tests.documented.conftest import Enter

BLOCKS = all_blocks()
NOT_EXECUTED = {
    "docs/benchmark.md": {"network": 1},
    "docs/costs.md": {"model": 1},
    "docs/engines.md": {"engine": 2},
    "docs/exporting.md": {"run, program": 1, "run, network": 1},
    "docs/judging.md": {"run, person": 1, "person": 1},
    "docs/new_recipe.md": {"model": 1},
    "docs/python.md": {"model": 2},
    "docs/results.md": {"person": 1},
    "docs/running.md": {"person": 2},
    "docs/serving.md": {"run, person": 1},
    "docs/stores.md": {"network": 1},
    "docs/tracking.md": {"program": 5},
}
"""How many blocks of each page no test executes, and why. What can be executed leaves this table, and nothing should
come to it. Blocks that need only a run are executed by ``tests/e2e/test_documented_commands.py``."""


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.id)
def test_a_block_is_as_the_page_says(block: Block, enter: Enter, capsys: Captured) -> None:
    enter(block.page)
    check(block, capsys)


def test_no_more_blocks_are_left_unexecuted_than_before() -> None:
    counts: dict[str, Counter[str]] = {}
    for block in BLOCKS:
        if block.needs not in ([], ["run"]):
            counts.setdefault(block.page, Counter())[", ".join(block.needs)] += 1
    assert counts == NOT_EXECUTED, "\n".join(f"{block.id}: {block.why}" for block in BLOCKS if block.needs)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_comment_stands_before_what_it_is_about(page: Path) -> None:
    assert stray_comments(page) == []
