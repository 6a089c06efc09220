"""Where the files of a run are, also after it was moved together with its artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignment.config import yaml_file
from alignment.core.artifacts import EVALUATION, REPORT
from alignment.core.errors import ConfigError
from alignment.records.run import RunRecord, StageEntry
from alignment.records.training import METRICS
from alignment.stages.registry import produced_by


def artifact_folder(run_folder: Path, stage: str, entry: StageEntry) -> Path | None:
    """Where the stage's artifact is or will be.

    run.json may hold a path or a folder name. The name is looked up next to the run first, so that a run that was moved
    together with its artifacts can still be read.
    """
    recorded = entry.artifact or _stage_file(run_folder / stage / "stage.yaml").get("artifact")
    if not isinstance(recorded, str) or not recorded:
        return None
    beside = run_folder.resolve().parent.parent / "artifacts" / Path(recorded).name
    return beside if beside.exists() or work_folder(beside).exists() else run_folder.resolve().parent.parent / recorded


def _stage_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml_file.read(path)
    except ConfigError:
        return {}
    return content if isinstance(content, dict) else {}


def work_folder(artifact: Path) -> Path:
    """Where an artifact is made."""
    return artifact.with_name(artifact.name + ".work")


def steps_file(artifact: Path) -> Path | None:
    """The metrics.jsonl of a stage; that of an unfinished stage is in its work folder."""
    folders = (artifact, work_folder(artifact) / "content")
    return next((folder / METRICS for folder in folders if (folder / METRICS).is_file()), None)


def evaluation_stages(record: RunRecord) -> list[str]:
    """The evaluations of a run: the one that its report names first, then the last one, and so on."""
    stages = record.stages.items()
    reports = [entry for _, entry in stages if produced_by(entry.kind) == REPORT]
    named = {ref.removeprefix("stage:") for entry in reports for _, ref in entry.references}
    evaluations = [name for name, entry in reversed(stages) if produced_by(entry.kind) == EVALUATION]
    return list(dict.fromkeys([*(name for name in record.stages if name in named), *evaluations]))
