"""What mkdocs calls while it builds the book (mkdocs.yml)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from book.markdown import anchor
from book.nav import expanded
from book.outside import FOLDER, Repository

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page


def _root(config: MkDocsConfig) -> Path:
    return Path(config.docs_dir).parent


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Expands the patterns of the nav, and gives headings the names that they have on GitHub."""
    docs = Path(config.docs_dir)
    config.nav = expanded(config.nav or [], [page.relative_to(docs).as_posix() for page in docs.rglob("*.md")])
    config.mdx_configs["toc"] = {**config.mdx_configs.get("toc", {}), "slugify": lambda text, _: anchor(text)}
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages of files beside docs/."""
    from mkdocs.structure.files import File, InclusionLevel

    for name, text in Repository(_root(config)).pages().items():
        hidden = "" if name.endswith(("README.md", "CONTRIBUTING.md")) else "---\nsearch:\n  exclude: true\n---\n\n"
        inclusion = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, name, content=hidden + text, inclusion=inclusion))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links to files beside docs/ to their pages."""
    name = page.file.src_uri
    if name.startswith(f"{FOLDER}/"):
        return markdown
    source = Path(config.docs_dir, name)
    return Repository(_root(config)).rewritten(markdown, source=source, name=name)
