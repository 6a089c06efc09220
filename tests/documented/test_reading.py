"""How blocks, comments, quoted outputs and quoted defaults are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.documented.blocks import PAGES, Block, all_blocks, name_of, stray_comments
from tests.documented.checks import Captured, check
from tests.documented.conftest import Enter

BLOCKS = all_blocks()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.id)
def test_a_block_is_as_the_page_says(block: Block, enter: Enter, capsys: Captured) -> None:
    enter(block.page)
    check(block, capsys)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_comment_stands_before_what_it_is_about(page: Path) -> None:
    assert stray_comments(page) == []
