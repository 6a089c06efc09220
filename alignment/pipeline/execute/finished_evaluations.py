"""The evaluations of a run that have a result."""

from __future__ import annotations

from pathlib import Path

from alignment.core.artifacts import EVALUATION
from alignment.records.evaluation import FILE
from alignment.records.run import RunRecord
from alignment.stages.registry import produced_by


def evaluations(run_folder: Path) -> dict[str, Path]:
    """The artifacts of a run's finished evaluations, by stage.

    Raises:
        ArtifactError: there is no such run.
    """
    stages = RunRecord.read(run_folder).stages
    artifacts = {name: Path(stage.artifact) for name, stage in stages.items() if produced_by(stage.kind) == EVALUATION}
    return {name: artifact for name, artifact in artifacts.items() if (artifact / FILE).is_file()}
