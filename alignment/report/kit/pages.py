"""Makes every page: one HTML file without scripts, requests or other files. A page holds text from data sets and
models, so templates escape everything. A content security policy in the page also forbids scripts and requests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from alignment.core.files import replacing
from alignment.report.kit import text


def environment(package: str) -> Environment:
    """The templates of a package, in its folder ``templates``; they escape everything and know every name they use."""
    return Environment(
        loader=PackageLoader(package, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def template(name: str, **filters: Callable[..., Any]) -> Template:
    """A page's template; ``filters`` are its own, beside those for numbers that all templates have."""
    templates = environment("alignment.report")
    shared = {"number": text.number, "share": text.share, "compact": text.compact, "bounds": text.bounds}
    templates.filters.update(shared, opening=partial(text.name, limit=90), **filters)
    return templates.get_template(name)


def write_page(html: str, output: Path) -> None:
    """Writes the page so that a reader sees the old one or the new one, never half of it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary:
        temporary.write_bytes(html.encode("utf-8", "replace"))
