"""Keeps ``run.json`` (records/run.py) up to date during a run."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignment.config.typed import to_plain
from alignment.core.artifacts import read_manifest
from alignment.pipeline.backends.slurm_jobs import HERE
from alignment.pipeline.execute.notes import cautions
from alignment.pipeline.plan import references
from alignment.pipeline.plan.actions import Action
from alignment.pipeline.plan.plan import Plan, PlannedStage
from alignment.records.cost import FILE as COST
from alignment.records.run import Attempts, RunRecord, StageEntry
from alignment.records.worker import STATUS


class RunRecorder:
    """Writes a run's progress, for ``align status`` and for the report. If the call runs ``only`` one stage, the
    entries of earlier results stay. If such a result was made with other settings than the current ones, its settings
    stay too, and the run is not done."""

    def __init__(self, plan: Plan, *, only: str | None = None) -> None:
        self._folder = plan.run_folder
        before = RunRecord.read_if_any(plan.run_folder)
        earlier = before if only is not None else RunRecord()
        stages = {stage.name: _earlier_or_new(stage, earlier.stages.get(stage.name), only) for stage in plan.stages}
        self._attempts_began: dict[str, float] = {}
        self._others = {stage.name for stage in plan.stages if stages[stage.name].artifact != str(stage.artifact)}
        config = to_plain(plan.config)
        config["stages"] |= {name: earlier.settings_of(name) for name in self._others}
        self.record = RunRecord(
            name=plan.config.name,
            recipe=plan.recipe,
            overrides=[override for override in plan.overrides if override != HERE],
            profile=plan.profile,
            config=config,
            started=earlier.started or _now(),
            state="running",
            stages=stages,
            cautions=cautions(plan),
        )
        for name, entry in stages.items():
            former = before.stages.get(name)
            if former is None or Path(former.artifact).name != Path(entry.artifact).name:
                for file in (STATUS, COST):  # of other settings
                    (self._folder / name / file).unlink(missing_ok=True)
        self._save()

    def stage(self, name: str, state: str, *, seconds: float | None = None) -> None:
        """Records a stage's new state and how long its last attempt took, to which the earlier ones are added."""
        started = _now() if state == "running" else self.record.stages[name].started
        entry = replace(self.record.stages[name], state=state, started=started)
        if seconds is not None:
            entry = replace(entry, seconds=round(entry.earlier_seconds + seconds, 2))
        self._save(stages={**self.record.stages, name: entry})

    def attempt(self, name: str, attempts: Attempts) -> None:
        """Records that an attempt at a stage begins, its number, and how long the earlier ones took."""
        self._attempts_began[name] = time.monotonic()
        earlier = round(attempts.earlier_seconds, 2)
        entry = self.record.stages[name]
        entry = replace(entry, attempts=attempts.number, earlier_seconds=earlier, started=_now())
        self._save(stages={**self.record.stages, name: entry})

    def attempt_seconds(self, name: str) -> float | None:
        """Since this call began its attempt at a stage; None if it waited for another process and began none."""
        began = self._attempts_began.get(name)
        return None if began is None else time.monotonic() - began

    def end(self) -> bool:
        """Records the end of this call. Returns whether the run is done; otherwise it waits for other calls."""
        done = not self._others and all(entry.complete for entry in self.record.stages.values())
        if done:
            self.finish("done")
        else:
            self._save(state="waiting")
        return done

    def finish(self, state: str) -> None:
        """Records how the run ended: ``done``, ``gate not met``, ``failed``, ``preempted`` or ``interrupted``."""
        self._save(state=state, finished=_now())

    def _save(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)
        self.record.write(self._folder)


def _earlier_or_new(stage: PlannedStage, earlier: StageEntry | None, only: str | None) -> StageEntry:
    """The entry of a stage: the earlier one if it is still true and the stage is not about to run, else a new one."""
    new = _entry(stage)
    if earlier is None:
        return new
    if earlier.artifact != new.artifact:
        keeps_earlier = stage.name != only and earlier.complete and stage.action is not Action.reuse
        return replace(earlier, reason="made with other settings") if keeps_earlier else new
    if stage.action is Action.reuse:
        return earlier if earlier.complete else new
    return earlier if earlier.state in ("waiting", "failed") and stage.name != only else new


def _entry(stage: PlannedStage) -> StageEntry:
    reused = stage.action is Action.reuse
    inputs: dict[str, Any] = {}  # a list of references for a field that holds several
    for slot in references.slots(stage.config):
        if references.is_arm(slot):
            inputs.setdefault(slot.field.partition("[")[0], []).append(slot.ref)
        else:
            inputs[slot.field] = slot.ref
    return StageEntry(
        kind=stage.config.kind,
        state="reused" if reused else "waiting",
        reason=stage.reason,
        artifact=str(stage.artifact),
        seconds=recorded_seconds(stage) if reused else None,
        inputs=inputs,
    )


def recorded_seconds(stage: PlannedStage) -> float | None:
    """The seconds that the result took when it was made."""
    manifest = read_manifest(stage.artifact)
    return manifest.usage.get("seconds") if manifest else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
