"""Puts the measured tables into docs/performance.md, between its markers: ``python -m benchmarks.page``.

Tables in folders inside ``results`` are of other machines; each folder has markers of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import RESULTS, ROOT
from benchmarks.setting import read_json
from benchmarks.works import WORKS

BEFORE_SEARCH = "**Measured before the search of rivals.**"
PAGE = ROOT / "docs" / "performance.md"


def tables(folder: Path) -> list[str]:
    """The tables that were measured in full, in the order of the works, each with what everyone was allowed.

    A table that does not know the searched settings of its rivals is marked.
    """
    texts = []
    for name, work in WORKS.items():
        file = folder / f"{name}.md"
        if file.is_file():
            title, rest = file.read_text(encoding="utf-8").strip().split("\n", 1)
            before = work.rivals and "at_their_best" not in read_json(file.with_suffix(".json"))
            mark = f"\n{BEFORE_SEARCH}\n" if before else ""
            texts.append(f"##{title}\n{mark}{rest}")  # a heading of the third level
    return texts


def filled(page: str, name: str, measured: Sequence[str]) -> str:
    """The page with tables between the markers of that name, and nothing else changed.

    Raises:
        ValueError: the page has no such markers, or more than one pair.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page needs one line {begin} and one {end} where the tables of '{name}' belong")
    before, rest = page.split(begin)
    after = rest.split(end)[1]
    return "".join([before, begin, "\n", "\n\n".join(measured), "\n", end, after])


def main() -> None:
    """Rewrites what stands between markers."""
    page = PAGE.read_text(encoding="utf-8")
    folders = {"tables": RESULTS} | {folder.name: folder for folder in sorted(RESULTS.iterdir()) if folder.is_dir()}
    for name, folder in folders.items():
        measured = tables(folder)
        page = filled(page, name, measured)
        print(f"{PAGE.relative_to(ROOT)}, {name}: {len(measured)} tables")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
