"""Puts the measured tables into docs/performance.md, between its markers: ``python -m benchmarks.page``."""

from __future__ import annotations

from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.works import WORKS

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- tables:begin -->", "<!-- tables:end -->"


def tables(folder: Path) -> list[str]:
    """The tables that were measured in full, in the order of the works, each with what everyone was allowed."""
    found = []
    for name in WORKS:
        file = folder / f"{name}.md"
        if file.is_file():
            found.append("##" + file.read_text(encoding="utf-8").strip())  # a heading of the third level
    return found


def main() -> None:
    """Rewrites the part between the markers, and nothing else."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    measured = "\n\n".join(tables(ROOT / "benchmarks" / "results"))
    PAGE.write_text(f"{before}{BEGIN}\n{measured}\n{END}{after}", encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {measured.count('### ')} tables")


if __name__ == "__main__":
    main()
