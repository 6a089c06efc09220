"""The book is built without a warning, is whole, and loads nothing from elsewhere. Skipped without mkdocs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from book.nav import expanded, names
from book.outside import Repository

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
MISSING = [name for name in ("mkdocs", "material", "mkdocstrings") if importlib.util.find_spec(name) is None]
needs_mkdocs = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (the extra docs)")


def test_the_nav_has_every_page_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = [name for name in names(expanded(nav, PAGES)) if not name.startswith("repository/")]
    assert sorted(named) == PAGES, "add the page to the nav of mkdocs.yml"


def test_a_pattern_of_the_nav_takes_the_pages_that_it_does_not_name() -> None:
    nav = ["a.md", {"Room": ["b/*.md", {"Inner": "b/1.md"}]}]
    assert expanded(nav, ["b/3.md", "b/2.md", "b/1.md", "a.md"]) == [
        "a.md",
        {"Room": ["b/2.md", "b/3.md", {"Inner": "b/1.md"}]},
    ]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A checkout of two pages, a README, a recipe and a folder."""
    for name, text in {
        "docs/README.md": "# Home\n\n[it](../README.md#first), [a recipe](../recipes/a.yaml), [all](../recipes)\n",
        "docs/deep/page.md": "# Page\n\n[home](../README.md) and [it](../../README.md)\n",
        "README.md": "# Project\n\n## First\n\n[page](docs/deep/page.md)\n\n```\n[code](docs/x.md)\n```\n",
        "recipes/a.yaml": "seed: 1\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_files_beside_docs_have_pages(repository: Path) -> None:
    assert Repository(repository).pages() == {
        "repository/README.md": "# Project\n\n## First\n\n[page](../deep/page.md)\n\n```\n[code](docs/x.md)\n```\n",
        "repository/recipes/a.yaml.md": "# recipes/a.yaml\n\n```yaml\nseed: 1\n```",
        "repository/recipes.md": "# recipes/\n\n- `a.yaml`",
    }


def test_links_out_of_docs_lead_to_these_pages_and_broken_ones_stay(repository: Path) -> None:
    source = repository / "docs/deep/page.md"
    text = "[it](../../README.md#first) [home](../README.md) [gone](../../GONE.md) [web](https://example.org)"
    assert Repository(repository).rewritten(text, source=source, name="deep/page.md") == (
        "[it](../repository/README.md#first) [home](../README.md) [gone](../../GONE.md) [web](https://example.org)"
    )


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", site]
    words, variables = [str(word) for word in command], {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


def small_config(repository: Path) -> Path:
    """The settings of the book, for the pages of another checkout."""
    own = {
        "INHERIT": str(ROOT / "mkdocs.yml"),
        "hooks": [str(ROOT / "book/hooks.py")],
        "theme": {"custom_dir": str(ROOT / "book/theme")},
        "nav": ["README.md", "deep/*.md"],
    }
    (repository / "mkdocs.yml").write_text(yaml.safe_dump(own), encoding="utf-8")
    return repository / "mkdocs.yml"


@needs_mkdocs
def test_broken_links_are_errors(repository: Path, tmp_path: Path) -> None:
    built = build(small_config(repository), tmp_path / "whole")
    assert built.returncode == 0, built.stderr
    with (repository / "docs/README.md").open("a", encoding="utf-8") as page:
        page.write("\n[gone](../GONE.md) [it](../README.md#second) [page](deep/page.md#nowhere)\n")
    built = build(small_config(repository), tmp_path / "site")
    assert built.returncode != 0
    warnings = [line for line in built.stderr.splitlines() if line.startswith("WARNING")]
    for target in ("'../GONE.md'", "'repository/README.md#second'", "'deep/page.md#nowhere'"):
        assert any(target in warning for warning in warnings), built.stderr


@needs_mkdocs
def test_the_book_is_whole_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    built = build(ROOT / "mkdocs.yml", tmp_path)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    html = {re.sub(r"(^|/)README\.md$", r"\1index.md", name).removesuffix(".md") + ".html" for name in PAGES}
    assert html <= {page.relative_to(tmp_path).as_posix() for page in tmp_path.rglob("*.html")}
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"?(\S+?)[\"\s>]", text)
        loaded += re.findall(r"<link\b[^>]*\bhref=\"?(\S+?)[\"\s>]", text)
        assert loaded
        assert not [address for address in loaded if "//" in address], page
        assert 'class="mermaid"' not in text, "the theme would load the script that draws it"
    index = json.loads((tmp_path / "search/search_index.json").read_text(encoding="utf-8"))
    assert any("missing_eos_penalty" in entry["text"] for entry in index["docs"])
    assert not [entry for entry in index["docs"] if entry["location"].startswith("repository/alignment/stages/dpo")]
