"""What a run would do and why, as plain records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.api.run_frames import data_frame
from alignment.config.typed import to_plain
from alignment.pipeline.backends.feasibility import why_not_here
from alignment.pipeline.execute import notes
from alignment.pipeline.plan.actions import Action
from alignment.pipeline.plan.plan import Plan, PlannedStage
from alignment.records.cost import RunCost

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """What happens to a stage: ``action`` is ``run``, ``resume``, ``reuse`` or ``fetch`` (the store has the
    result), and ``reason`` says why in words.

    ``fingerprint`` identifies the result (64 hexadecimal digits), ``artifact`` is its folder. ``inputs`` are references
    by the field that holds them. ``remarks`` say what the stage would read, run and choose, and what its gates
    require; each is the end of a sentence that begins with its name. ``settings`` are plain data.
    """

    name: str
    kind: str
    action: Action
    reason: str
    fingerprint: str
    artifact: Path
    inputs: dict[str, str]
    remarks: tuple[str, ...]
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class RunPlan:
    """What a run would do, in the order of its stages.

    ``folder`` is where the run is recorded. ``notes`` are sentences about a plan that is valid but questionable.
    ``obstacle`` says why this machine cannot start it; empty if it can. ``cost`` is None where none was estimated.
    """

    name: str
    summary: str
    recipe: str
    overrides: tuple[str, ...]
    profile: str
    folder: Path
    stages: dict[str, StagePlan]
    notes: tuple[str, ...]
    obstacle: str
    settings: dict[str, Any]
    cost: RunCost | None = None

    @property
    def to_run(self) -> tuple[StagePlan, ...]:
        """The stages that would run or continue; the others are reused."""
        return tuple(stage for stage in self.stages.values() if stage.action in (Action.run, Action.resume))

    def frame(self) -> pandas.DataFrame:
        """A row for each stage: ``stage``, ``kind``, ``action``, ``reason`` and ``artifact``. Raises ConfigError:
        pandas is not installed."""
        columns = ("stage", "kind", "action", "reason", "artifact")
        rows = ((s.name, s.kind, s.action.value, s.reason, str(s.artifact)) for s in self.stages.values())
        return data_frame(columns, (dict(zip(columns, row, strict=True)) for row in rows))

    def __repr__(self) -> str:
        reused = len(self.stages) - len(self.to_run)
        lines = [f"{stage.name}: {stage.action.value} ({stage.reason})" for stage in self.stages.values()]
        return "\n  ".join([f"RunPlan {self.name}: {len(self.to_run)} to run, {reused} reused", *lines])


def described(plan: Plan, cost: RunCost | None) -> RunPlan:
    """The public record of a plan."""
    return RunPlan(
        name=plan.config.name,
        summary=plan.config.summary,
        recipe=plan.recipe,
        overrides=plan.overrides,
        profile=plan.profile,
        folder=plan.run_folder,
        stages={stage.name: _described(plan, stage) for stage in plan.stages},
        notes=tuple(notes.on_a_plan(plan)),
        obstacle=why_not_here(plan),
        settings=to_plain(plan.config),
        cost=cost,
    )


def _described(plan: Plan, stage: PlannedStage) -> StagePlan:
    references = {field: given.ref for field, given in stage.inputs.items()}
    return StagePlan(
        name=stage.name,
        kind=stage.config.kind,
        action=stage.action,
        reason=stage.reason,
        fingerprint=stage.fingerprint,
        artifact=stage.artifact,
        inputs=references | {f"arms[{number}]": arm.ref for number, arm in enumerate(stage.arms.values())},
        remarks=tuple(notes.of_stage(plan, stage)),
        settings=to_plain(stage.config),
    )
