"""The reading times that the page for beginners gives for its jobs are those of the pages it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documented.blocks import ROOT
from tests.documented.blocks import prose as prose_of
from tests.documented.blocks import tables as tables_of

PAGE = ROOT / "docs/start/README.md"
WORDS_A_MINUTE = 220
MAX_MINUTES = 10
_LINK = re.compile(r"\]\(([^)#]+)(#[^)]+)?\)")
_HEADING = re.compile(r"#+ (.+)")
JOBS = {row[0]: row for table in tables_of(PAGE) if table.head[-1] == "minutes" for row in table.rows}


def _anchor(heading: str) -> str:
    return "#" + re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")


def _words(page: Path, anchor: str) -> int:
    """Words of a page, or of the part below one heading of it, up to the next heading."""
    lines = page.read_text(encoding="utf-8").splitlines()
    if anchor:
        headings = [(number, _HEADING.fullmatch(line)) for number, line in prose_of(page)]
        starts = [(number, _anchor(match[1])) for number, match in headings if match] + [(len(lines) + 1, "")]
        (position,) = [index for index, (_, name) in enumerate(starts) if name == anchor]
        lines = lines[starts[position][0] - 1 : starts[position + 1][0] - 1]
    return sum(len(line.split()) for line in lines)


@pytest.mark.parametrize("job", JOBS)
def test_a_job_takes_as_many_minutes_of_reading_as_its_row_says(job: str) -> None:
    _, pages, minutes = JOBS[job]
    links = _LINK.findall(pages)
    assert links
    words = _words(ROOT / "README.md", "") + sum(_words(PAGE.parent / page, anchor) for page, anchor in links)
    assert int(minutes) == round(words / WORDS_A_MINUTE), f"{words} words"
    assert words / WORDS_A_MINUTE < MAX_MINUTES


def test_there_are_ten_jobs() -> None:
    assert len(JOBS) == 10
