"""The evaluations of a run that have a result."""

from __future__ import annotations

from pathlib import Path

from alignment.core.artifacts import EVALUATION
from alignment.records.evaluation import FILE
from alignment.records.run import RunRecord
from alignment.report.run_page.run_layout import artifact_folder
from alignment.stages.registry import produced_by


def evaluations(run_folder: Path) -> dict[str, Path]:
    """The artifacts of a run's finished evaluations, by stage.

    Raises:
        ArtifactError: there is no such run.
    """
    stages = RunRecord.read(run_folder).stages
    folders = {
        name: artifact_folder(run_folder, name, stage)
        for name, stage in stages.items()
        if produced_by(stage.kind) == EVALUATION
    }
    return {name: folder for name, folder in folders.items() if folder is not None and (folder / FILE).is_file()}
