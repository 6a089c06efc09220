"""The stage kind ``report``, as the rest of the package sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from alignment.config.new_recipe import Circumstances, NewStage, Reasoned
from alignment.config.rules import POSITIVE
from alignment.config.stage import reference_to
from alignment.core.artifacts import EVALUATION, POLICY, REPORT
from alignment.stages.base import LaunchShape, Proposals, RunsOn, StageKind


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """One self-contained HTML file about the run; the driver makes it only from files."""

    kind: str = "report"
    evaluation: str | None = reference_to("stage:evaluate", "evaluation")
    num_samples: Annotated[int, POSITIVE] = 12


def _stage(circumstances: Circumstances) -> NewStage | None:
    if not circumstances.made.get(POLICY):
        return None
    why = "One page about the run."
    if circumstances.made.get(EVALUATION):
        return NewStage(why=why, settings={})
    return NewStage(why=why, settings={"evaluation": Reasoned(value=None, why="there are no held-out prompts")})


KIND = StageKind(
    name="report",
    summary="one HTML page about the whole run",
    config=ReportConfig,
    revision=2,
    produces=REPORT,
    launch=LaunchShape(runs_on=RunsOn.driver),
    proposals=Proposals(stage=_stage),
)
