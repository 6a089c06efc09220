"""The documentation: README is short, links lead somewhere, every page is in the index, targets of make exist.
``tests/documented`` executes and checks what the pages show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FOLDERS = (".github", "alignment", "benchmarks", "conf", "data", "docs", "launch", "recipes", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
INDEXED_ELSEWHERE = ("design/", "reference/configuration/")
"""Folders of docs/ with an index of their own: design/README.md, and reference/configuration.md, which is generated."""


def relative_links(page: Path) -> list[str]:
    """What a page links to, without other sites. Code in fences has no links."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [link for link in LINK.findall(prose) if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
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


def test_the_indexes_have_every_page() -> None:
    indexed = {link.partition("#")[0] for link in relative_links(DOCS / "README.md")}
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} - {"README.md"}
    assert {page for page in pages if not page.startswith(INDEXED_ELSEWHERE)} | {"design/README.md"} <= indexed
    designs = {link for link in relative_links(DOCS / "design/README.md") if link.endswith(".md")}
    assert designs == {page.name for page in (DOCS / "design").glob("*.md")} - {"README.md"}


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        if page.name in ("CHANGELOG.md", "LOG.md"):  # they speak of targets that are gone
            continue
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"`make ([a-z-]+)", FENCE.sub("", text))
        named += re.findall(r"^(?:\$ )?make ([a-z-]+)", "".join(FENCE.findall(text)), re.MULTILINE)
        assert set(named) <= targets, page.name
