"""``docs/extending.md`` against the code: files, names in them and tests exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from alignment.rewards.rules.all_rules import RULES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| [^|]+ \| `([^`|]+)` \| `([^`|]+)` \| (?:`([^`|]+)`: `(\w+)`|–) \|$", re.MULTILINE)
STEPS = ROW.findall(PAGE)
PATH = re.compile(r"`((?:alignment|conf|docs|tests)/[\w/.]+)`")


def has(path: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", (ROOT / path).read_text(encoding="utf-8")) is not None


def test_every_line_of_the_tables_is_read() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| step |")]
    assert len(STEPS) == len(lines) > 20


@pytest.mark.parametrize(("path", "name", "test_file", "test"), STEPS, ids=lambda value: value or "no-test")
def test_a_step_names_what_is_there(path: str, name: str, test_file: str, test: str) -> None:
    assert has(path, name), f"{path} has no {name}"
    assert not test_file or has(test_file, f"def {test}"), f"{test_file} has no {test}"


def test_every_path_in_the_text_is_there() -> None:
    assert [path for path in PATH.findall(PAGE) if not (ROOT / path).exists()] == []


def test_every_rule_is_in_the_docs() -> None:
    assert [name for name in RULES if not has("docs/rewards.md", name)] == []
