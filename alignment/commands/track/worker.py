"""Sends the stages of a run to a tracker, for ``align track``: ``worker FOLDER --to TRACKER [--url URL]``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from alignment.commands.shared.worker_process import reported, run_as_program
from alignment.config.run import LABELS, with_only
from alignment.core.artifacts import read_manifest
from alignment.core.errors import StageError
from alignment.core.files import explained
from alignment.core.locks import held
from alignment.job import StageSpec
from alignment.records.run import RunRecord
from alignment.records.training import METRICS, readable_rows
from alignment.report.run_page.run_records import artifact_folder, work_folder
from alignment.stages.registry import kinds, read_spec
from alignment.training.trackers.all_trackers import Trackers
from alignment.training.trackers.tracker import stored_tables


@reported
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0, or that of the error."""
    parser = argparse.ArgumentParser(prog="python -m alignment.commands.track.worker", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", required=True, choices=LABELS)
    parser.add_argument("--url", default="")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)  # what a tracker warns of is in the error
    with explained(options.folder):
        send_run(options.folder, options.to, options.url)
    return 0


def send_run(folder: Path, tracker: str, url: str) -> None:
    """Sends all stages of a run that were made by it, and prints a line about each. Raises Busy, StageError."""
    label, num_sent, num_left_out = LABELS[tracker], 0, 0
    for name, entry in RunRecord.read(folder).stages.items():
        file, artifact = folder / name / "stage.yaml", artifact_folder(folder, name, entry)
        spec = read_spec(file) if file.is_file() else None
        if spec is not None and artifact is not None and spec.artifact.name == artifact.name:
            tracking = with_only(spec.tracking, tracker, mlflow_url=url)
            work = work_folder(artifact)
            print(send(replace(spec, artifact=artifact, work=work, run_folder=folder / name, tracking=tracking), label))
            num_sent += 1
        elif entry.complete and entry.kind in kinds() and kinds()[entry.kind].run:
            num_left_out += 1
            reason = "another run made its result" if spec is None else f"{file} has other settings than its result"
            print(f"{name}: not sent, because {reason}")
    if num_sent and not num_left_out:
        print(f"{label} already has everything from {folder.name}")
    elif not num_sent and not num_left_out:
        print(f"{folder.name} has nothing to send yet")


def send(spec: StageSpec, label: str) -> str:
    """Sends all that the stage's files have to its trackers; returns a message about it. It raises as ``send_run``."""
    manifest = read_manifest(spec.artifact)
    content = spec.work / "content" if manifest is None else spec.artifact
    trackers = Trackers()
    # A running worker holds this lock; a stage that has ended has no folder for it.
    lock = held(spec.work / "worker.lock", wait=False) if spec.work.is_dir() else nullcontext()
    with lock:
        rows = readable_rows(content / METRICS)[0] if (content / METRICS).is_file() else []
        trackers.start(spec)
        trackers.catch_up(rows)
        for name, table in stored_tables(spec).items():
            trackers.table(name, table)
        if manifest is not None:
            trackers.result(manifest, spec.artifact)
        trackers.close(done=manifest is not None)
    if trackers.faults:
        raise StageError("; ".join(trackers.faults), where=f"stage {spec.stage}")
    return f"{spec.stage}: {label} has {len(rows)} steps" + ("" if manifest is None else " and the result")


if __name__ == "__main__":
    run_as_program(main)
