"""The driver's own record of a run: ``run.json``, replaced after every change."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignment.artifacts import read_manifest, write_json
from alignment.config.typed import to_plain
from alignment.errors import ArtifactError
from alignment.pipeline import references
from alignment.pipeline.plan import Action, Plan, PlannedStage

FILE = "run.json"


class RunRecord:
    """Writes how far a run is, for ``align status`` and for the report."""

    def __init__(self, plan: Plan) -> None:
        self._path = plan.run_folder / FILE
        self._content: dict[str, Any] = {
            "name": plan.config.name,
            "recipe": plan.recipe,
            "overrides": list(plan.overrides),
            "config": to_plain(plan.config),
            "started": _now(),
            "finished": None,
            "state": "running",
            "stages": {stage.name: _entry(stage) for stage in plan.stages},
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

    def finish(self, state: str) -> None:
        """Notes how the run ended: ``done``, ``failed``, ``preempted`` or ``interrupted``."""
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
    except ValueError as error:
        raise ArtifactError(
            f"unreadable: {error}", where=str(path), remedy="start the run again to rewrite it"
        ) from error
    assert isinstance(content, dict)
    return content


def _entry(stage: PlannedStage) -> dict[str, Any]:
    reused = stage.action is Action.reuse
    return {
        "kind": stage.config.kind,
        "state": "reused" if reused else "waiting",
        "reason": stage.reason,
        "artifact": str(stage.artifact),
        "seconds": _seconds_then(stage) if reused else None,
        "inputs": _inputs(stage),
    }


def _seconds_then(stage: PlannedStage) -> float | None:
    """What the result took when it was made."""
    manifest = read_manifest(stage.artifact)
    return manifest.usage.get("seconds") if manifest else None


def _inputs(stage: PlannedStage) -> dict[str, Any]:
    """Field → reference; a list for a field that holds several."""
    found: dict[str, Any] = {}
    for slot in references.slots(stage.config):
        if slot.is_arm:
            found.setdefault(slot.field.partition("[")[0], []).append(slot.ref)
        else:
            found[slot.field] = slot.ref
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
