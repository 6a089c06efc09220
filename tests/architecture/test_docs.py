"""The documentation: README is short, links lead somewhere, every page is in the index, commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from alignment.cli import parse
from alignment.config.typed import typed
from alignment.pipeline.plan import settings
from alignment.pipeline.plan.compose import compose
from alignment.stages.registry import config_classes

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FOLDERS = ("alignment", "benchmarks", "conf", "data", "docs", "launch", "recipes", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\$ )?(align [a-z].*)$", re.MULTILINE)
MOST_WORDS = 900


def relative_links(page: Path) -> list[str]:
    """What a page links to, without other sites. Code in fences has no links."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [link for link in LINK.findall(prose) if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in relative_links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} in {page.name} points to no file"
        if anchor:
            assert anchor in anchors(target), f"{link} in {page.name} points to no heading"


def test_the_readme_takes_three_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= MOST_WORDS


def test_the_indexes_have_every_page() -> None:
    indexed = {link.partition("#")[0] for link in relative_links(DOCS / "README.md")}
    pages = {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    assert pages | {"design/README.md"} <= indexed
    designs = {link for link in relative_links(DOCS / "design/README.md") if link.endswith(".md")}
    assert designs == {page.name for page in (DOCS / "design").glob("*.md")} - {"README.md"}


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"`make ([a-z-]+)", FENCE.sub("", text))
        named += re.findall(r"^(?:\$ )?make ([a-z-]+)", "".join(FENCE.findall(text)), re.MULTILINE)
        assert set(named) <= targets, page.name


COMMANDS = sorted({line for page in PAGES for line in re.findall(COMMAND, page.read_text(encoding="utf-8"))})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses_and_its_settings_compose(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = parse(shlex.split(command, comments=True)[1:])
    recipe = getattr(options, "recipe", None)
    if recipe not in (None, "./mine.yaml") and options.overrides:  # recipes by themselves are composed elsewhere
        composition = compose(recipe, options.overrides)
        assert not composition.faults
        typed(composition.tree, config_classes())


def test_the_recipe_in_readme_and_docs_is_one(tmp_path: Path) -> None:
    first, second = (
        re.findall(r"```yaml\n(defaults:.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[0]
        for page in (ROOT / "README.md", DOCS / "recipes.md")
    )
    for text in (first, second):
        (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
        composition = compose(str(tmp_path / "mine.yaml"), [])
        assert not composition.faults
        assert list(typed(composition.tree, config_classes()).stages) == ["sft", "dpo"]


RECIPES = [
    (page, text)
    for page in PAGES
    for text in re.findall(r"```yaml\n(defaults:.*?)```", page.read_text("utf-8"), re.DOTALL)
]


@pytest.mark.parametrize(("page", "text"), RECIPES, ids=lambda value: value.name if isinstance(value, Path) else "")
def test_a_recipe_in_the_docs_names_the_rows_of_its_stages(page: Path, text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    composition = compose(str(tmp_path / "mine.yaml"), [])
    assert not composition.faults
    faults = settings.faults(typed(composition.tree, config_classes()))
    assert not [fault for fault in faults if fault.where.endswith("data.source")], page.name
