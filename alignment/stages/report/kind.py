"""The stage kind ``report``, as the rest of the package sees it."""

from __future__ import annotations

from alignment.core.artifacts import REPORT
from alignment.stages.base import LaunchShape, References, RunsOn, StageKind
from alignment.stages.report.config import ReportConfig
from alignment.stages.report.proposal import PROPOSALS

KIND = StageKind(
    name="report",
    summary="one HTML page about the whole run",
    config=ReportConfig,
    revision=2,
    produces=REPORT,
    references=References(whole_run=True),
    launch=LaunchShape(runs_on=RunsOn.driver),
    proposals=PROPOSALS,
)
