"""``python -m tests.unit.report.picture`` takes docs/report.png: the beginning of a report with invented numbers."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.browser import opened
from tests.unit.report.conftest import FakeRun

PICTURE = Path(__file__).parents[3] / "docs/report.png"
HEIGHT = 1445
"""Pixels down to the end of the arms' intervals."""


def main() -> None:
    """Writes the picture. The run's name says that it is an example."""
    with tempfile.TemporaryDirectory() as folder:
        run = FakeRun(Path(folder))
        run.run.update(name="example", recipe="example")
        run.html()
        opened(Path(folder) / "report.html", PICTURE, height=HEIGHT)


if __name__ == "__main__":
    main()
