"""The generated pages of the reference, by their name below docs/."""

from __future__ import annotations

from pathlib import Path

from book import command_line, errors_page, files_page, metrics_page, settings_pages
from book.markdown import NOTICE

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def pages() -> dict[str, str]:
    """Every generated page, as the code of this moment gives it."""
    texts = {
        **settings_pages.pages(),
        "reference/command_line.md": command_line.page(),
        "reference/errors.md": errors_page.page(),
        "reference/files.md": files_page.page(),
        "reference/metrics.md": metrics_page.page(),
    }
    return {name: _with_notice(text.strip()) for name, text in texts.items()}


def _with_notice(text: str) -> str:
    """The notice stands below the heading, because mkdocs takes a page's title from its first line."""
    heading, _, rest = text.partition("\n")
    return f"{heading}\n\n{NOTICE}\n{rest}\n"


def stale() -> list[str]:
    """Names of pages that were generated once, and are not any more."""
    current = pages()
    generated = (page for page in (DOCS / "reference").rglob("*.md") if NOTICE in page.read_text("utf-8"))
    return sorted(name for page in generated if (name := page.relative_to(DOCS).as_posix()) not in current)
