"""Files beside docs/ that pages link to, such as README.md, a recipe or a data card: the book has a page for each. The
page of a Markdown file is its text. That of another file shows it as code, and that of a folder lists it."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

FOLDER = "repository"
"""The folder of the book that these pages are in."""
_LINK = re.compile(r"(\]\()([^()\s]+)(\))")
_FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".toml": "toml"}


class Repository:
    """A checkout, whose pages are in ``docs`` below its ``root``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._docs = root / "docs"

    def pages(self) -> dict[str, str]:
        """The text of the page of each file beside docs/ to which a page leads, directly or through others of these."""
        pending = [target for page in sorted(self._docs.rglob("*.md")) for target in self._targets(page)]
        texts: dict[str, str] = {}
        while pending:
            target = pending.pop()
            if self._name(target) not in texts:
                texts[self._name(target)] = self._text(target)
                pending += self._targets(target)
        return texts

    def rewritten(self, text: str, *, source: Path, name: str) -> str:
        """The text of the file ``source``, with links that hold in its page ``name``. A link to a file that does not
        exist stays as it is, so that mkdocs complains about it."""

        def link(match: re.Match[str]) -> str:
            path, mark, anchor = match[2].partition("#")
            target = self._target(path, source)
            if target is None:
                return match[0]
            new = posixpath.relpath(self._name(target), posixpath.dirname(name) or ".")
            return f"{match[1]}{new}{mark}{anchor}{match[3]}"

        parts = _FENCE.split(text)  # those at odd places are fences
        return "".join(part if number % 2 else _LINK.sub(link, part) for number, part in enumerate(parts))

    def _targets(self, page: Path) -> Iterator[Path]:
        """The files beside docs/ to which a page leads."""
        if page.suffix == ".md":
            for match in _LINK.finditer(_FENCE.sub("", page.read_text(encoding="utf-8"))):
                target = self._target(match[2].partition("#")[0], page)
                if target is not None and not target.is_relative_to(self._docs):
                    yield target

    def _target(self, path: str, source: Path) -> Path | None:
        """The file of this checkout to which a link leads; None if it leads elsewhere or nowhere."""
        if not path or re.match(r"[a-z]+:", path):
            return None
        target = (source.parent / path).resolve()
        return target if target.exists() and target.is_relative_to(self._root) else None

    def _name(self, target: Path) -> str:
        """The page of a file of this checkout, or the file of docs/ itself."""
        if target.is_relative_to(self._docs):
            return target.relative_to(self._docs).as_posix()
        name = target.relative_to(self._root).as_posix()
        return f"{FOLDER}/{name}" if target.suffix == ".md" else f"{FOLDER}/{name}.md"

    def _text(self, target: Path) -> str:
        title = target.relative_to(self._root).as_posix()
        if target.is_dir():
            listed = sorted(file.name for file in target.iterdir() if file.is_file())
            return "\n".join([f"# {title}/", "", *(f"- `{name}`" for name in listed)])
        text = target.read_text(encoding="utf-8")
        if target.suffix == ".md":
            return self.rewritten(text, source=target, name=self._name(target))
        return f"# {title}\n\n```{_LANGUAGES.get(target.suffix, 'text')}\n{text.rstrip()}\n```"
