"""A report shows what was planned beside what was measured, and says nothing where nothing was planned."""

from __future__ import annotations

import re

from alignment.records.cost import FILE, PhaseCost, RunCost, StageCost
from tests.unit.report.conftest import FakeRun

PHASES = {"training": PhaseCost(peak=1_000_000_000, held=1_500_000_000, seconds=90.0)}


def test_planned_time_and_memory_stand_beside_the_measured_ones(fake_run: FakeRun) -> None:
    planned = StageCost(stage="sft", kind="sft", phases=PHASES, fixed=500_000_000)
    row = planned_row(fake_run, planned)
    assert 'data-label="planned time">1\u202fmin 30\u202fs<' in row
    assert re.search(r'data-label="planned memory">2\.0\u202fGB<', row)


def test_the_time_of_the_first_rows_is_not_shown_as_that_of_the_stage(fake_run: FakeRun) -> None:
    planned = StageCost(stage="sft", kind="sft", phases=PHASES, first_rows=1_000)
    row = planned_row(fake_run, planned)
    assert 'data-label="planned time">–<' in row
    assert re.search(r'data-label="planned memory">1\.5\u202fGB<', row)


def planned_row(run: FakeRun, planned: StageCost) -> str:
    """The row of the SFT stage on the page of a run for which this was planned."""
    (run.folder / "sft").mkdir(parents=True)
    RunCost(device="this", stages=[planned]).write(run.folder / "sft" / FILE)
    [row] = re.findall(
        r"<tr>(?:(?!</tr>).)*<bdi>sft</bdi>(?:(?!</tr>).)*planned memory(?:(?!</tr>).)*</tr>", run.html()
    )
    return str(row)


def test_without_a_plan_there_is_no_column_for_it(fake_run: FakeRun) -> None:
    assert "planned memory" not in fake_run.html()


def test_a_damaged_plan_is_left_out(fake_run: FakeRun) -> None:
    (fake_run.folder / "sft").mkdir(parents=True)
    (fake_run.folder / "sft" / FILE).write_text("{", encoding="utf-8")
    assert "planned memory" not in fake_run.html()
