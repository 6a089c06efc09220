"""How blocks, comments, quoted outputs and quoted defaults are read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.documented import tables
from tests.documented.blocks import PAGES, BadComment, Block, all_blocks, blocks, name_of, stray_comments
from tests.documented.checks import Captured, check
from tests.documented.commands import commands, same_output
from tests.documented.conftest import Enter

PAGE = """Text.

<!-- needs: run -->
<!-- output differs -->
```console
$ align status mine   # all of it
sft  done
$ align recipes
```

    <!-- drawing -->
    ```
    a ─► b
    ```
"""


def read(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_a_block_has_its_line_its_comments_and_its_commands(tmp_path: Path) -> None:
    console, drawing = blocks(read(tmp_path, PAGE))
    assert (console.id, console.language, console.needs) == ("page.md:5", "console", ["run"])
    assert "output differs" in console.comments
    assert [(command.line, command.words, command.output) for command in commands(console)] == [
        (6, ["align", "status", "mine"], "sft  done"),
        (8, ["align", "recipes"], ""),
    ]
    assert (drawing.line, drawing.text, dict(drawing.comments)) == (12, "a ─► b\n", {"drawing": ""})


@pytest.mark.parametrize(("old", "new"), [("needs: run", "need: run"), ("needs: run", "needs: luck")])
def test_a_comment_that_says_nothing_known_is_refused(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(BadComment, match=new.partition(" ")[2]):
        blocks(read(tmp_path, PAGE.replace(old, new)))


def test_a_comment_before_nothing_is_named(tmp_path: Path) -> None:
    assert stray_comments(read(tmp_path, PAGE)) == []
    stray = stray_comments(read(tmp_path, f"<!-- drawing -->\n\n{PAGE}"))
    assert stray == ["page.md:1 <!-- drawing -->"]


@pytest.mark.parametrize(
    ("quoted", "printed", "exactly", "roughly"),
    [
        ("a 1\nb", "a 1 \nb\n", True, True),
        ("a 1\nb", "a 2\nb", False, True),
        ("in /home/me/x: .5", "in /tmp/y/z-2: 12.25", False, True),
        ("a", "a\nb", False, False),
        ("a\n…", "a\nb\nc", True, True),
        ("a {…}", "a {1, 2}", True, True),
        ("a {…}", "a {1, 2", False, False),
    ],
)
def test_an_output_is_compared_but_for_numbers_and_paths(
    quoted: str, printed: str, exactly: bool, roughly: bool
) -> None:
    assert same_output(quoted, printed, differs=False) is exactly
    assert same_output(quoted, printed, differs=True) is roughly


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("`launch.hang_seconds` (600; 0 for never)", []),
        ("`launch.hang_seconds` (500; 0 for never)", ["launch.hang_seconds has the default 600, not 500"]),
        ("`launch.hang_seconds` (see below)", []),
    ],
)
def test_a_default_in_parentheses_is_compared(line: str, fault: list[str]) -> None:
    assert list(tables.default_faults(line)) == fault


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
