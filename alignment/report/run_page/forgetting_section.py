"""The results of a ``forgetting`` stage, as far as its file can be read."""

from __future__ import annotations

from pathlib import Path

from alignment.records import stages
from alignment.report.kit.record_files import shown
from alignment.report.run_page.run_records import Forgetting


def read_forgetting(stage: str, folder: Path | None) -> Forgetting:
    """The results of the stage, or a note that says why there are none."""
    if folder is None or not (folder / stages.FORGETTING_FILE).is_file():
        return Forgetting(stage=stage, note=f"{stage} has no result yet.")
    record, note = shown(folder / stages.FORGETTING_FILE, stages.Forgetting)
    if record is not None and not record.arms:
        note = f"The file {stages.FORGETTING_FILE} names no arms."
    return Forgetting(stage=stage, record=record, note=note)
