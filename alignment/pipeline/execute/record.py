"""The driver's own record of a run: ``run.json``, replaced after every change."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignment.config.typed import to_plain
from alignment.core.artifacts import read_manifest, write_json
from alignment.core.errors import ArtifactError
from alignment.core.shapes import fits
from alignment.pipeline.backends.slurm_job_file import HERE
from alignment.pipeline.plan import references
from alignment.pipeline.plan.plan import Action, Plan, PlannedStage

FILE = "run.json"
DONE = ("done", "reused")


class RunRecord:
    """Writes how far a run is, for ``align status`` and for the report.

    Where the run is about one stage ``only``, what was recorded of results before stays. Of a result that was made with
    other settings than those of now, its settings stay too; such a run is not done.
    """

    def __init__(self, plan: Plan, *, only: str | None = None) -> None:
        self._path = plan.run_folder / FILE
        earlier = _recorded(plan.run_folder) if only is not None else {}
        stages = {stage.name: _kept_or_new(stage, earlier, only) for stage in plan.stages}
        self._others = {one.name for one in plan.stages if stages[one.name]["artifact"] != str(one.artifact)}
        config = to_plain(plan.config)
        config["stages"] |= {name: earlier["config"]["stages"][name] for name in self._others}
        self._content: dict[str, Any] = {
            "name": plan.config.name,
            "recipe": plan.recipe,
            "overrides": [override for override in plan.overrides if override != HERE],
            "profile": plan.profile,
            "config": config,
            "started": earlier.get("started", _now()),
            "finished": None,
            "state": "running",
            "stages": stages,
        }
        self._save()

    @property
    def content(self) -> dict[str, Any]:
        """What the file holds."""
        return self._content

    def stage(self, name: str, state: str, *, seconds: float | None = None) -> None:
        """Notes a stage's new state, and what it took."""
        entry = self._content["stages"][name]
        entry["state"] = state
        if seconds is not None:
            entry["seconds"] = round(seconds, 2)
        self._save()

    def end(self) -> bool:
        """Notes that nothing more happens here; returns whether the run is done, or else waits for other calls."""
        done = not self._others and all(entry["state"] in DONE for entry in self._content["stages"].values())
        if done:
            self.finish("done")
        else:
            self._content["state"] = "waiting"
            self._save()
        return done

    def finish(self, state: str) -> None:
        """Notes how the run ended: ``done``, ``forgot``, ``failed``, ``preempted`` or ``interrupted``."""
        self._content["state"] = state
        self._content["finished"] = _now()
        self._save()

    def _save(self) -> None:
        write_json(self._path, self._content)


def read_record(run_folder: Path) -> dict[str, Any]:
    """The content of a run's ``run.json``.

    Raises:
        ArtifactError: it is missing or unreadable.
    """
    path = run_folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            "no run is recorded here", where=str(run_folder), remedy="start one: align run RECIPE"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"unreadable: {error}", where=str(path), remedy="start the run again to rewrite it"
        ) from error
    if not fits(content, dict[str, Any]) or not fits(content.get("stages"), dict[str, dict[str, Any]]):
        raise ArtifactError("is no record of a run", where=str(path), remedy="start the run again to rewrite it")
    return dict(content)


def _recorded(run_folder: Path) -> dict[str, Any]:
    """What is recorded of the run, or nothing where that cannot be read: it is written anew."""
    try:
        return read_record(run_folder)
    except ArtifactError:
        return {}


def _kept_or_new(stage: PlannedStage, earlier: dict[str, Any], only: str | None) -> dict[str, Any]:
    """The entry of a stage: the one before as long as it is true, and the stage is not about to be run."""
    new = _entry(stage)
    kept: dict[str, Any] | None = earlier.get("stages", {}).get(stage.name)
    if kept is None:
        return new
    if kept["artifact"] != new["artifact"]:
        there = stage.name != only and kept["state"] in DONE and stage.action is not Action.reuse
        return {**kept, "reason": "made with other settings"} if there else new
    if stage.action is Action.reuse:
        return kept if kept["state"] in DONE else new
    return kept if kept["state"] in ("waiting", "failed") and stage.name != only else new


def _entry(stage: PlannedStage) -> dict[str, Any]:
    reused = stage.action is Action.reuse
    return {
        "kind": stage.config.kind,
        "state": "reused" if reused else "waiting",
        "reason": stage.reason,
        "artifact": str(stage.artifact),
        "seconds": seconds_then(stage) if reused else None,
        "inputs": _inputs(stage),
    }


def seconds_then(stage: PlannedStage) -> float | None:
    """What the result took when it was made."""
    manifest = read_manifest(stage.artifact)
    return manifest.usage.get("seconds") if manifest else None


def _inputs(stage: PlannedStage) -> dict[str, Any]:
    """Field → reference; a list for a field that holds several."""
    found: dict[str, Any] = {}
    for slot in references.slots(stage.config):
        if references.is_arm(slot):
            found.setdefault(slot.field.partition("[")[0], []).append(slot.ref)
        else:
            found[slot.field] = slot.ref
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
