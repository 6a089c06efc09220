"""The state of runs, read from their files, whether or not they are still running."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from alignment.commands.shared.named_runs import run_folder, run_names
from alignment.core.errors import ArtifactError
from alignment.pipeline.backends import slurm_jobs
from alignment.pipeline.execute.run_state import as_it_is, explanation, state_of
from alignment.pipeline.execute.run_view import KILLED, RUNNING, work_folder
from alignment.pipeline.execute.summary import progress_line, show_doubts, show_results, show_stages
from alignment.records.run import RunRecord
from alignment.records.worker import Progress


def show_status(console: Console, output: Path, run: str | None) -> None:
    """Prints one run in full, or a line for each run under ``output/runs``.

    Raises:
        ConfigError: there is no such run; the error suggests one.
    """
    if run is None:
        names = run_names(output)
        if not names:
            console.print(f"no runs under {output / 'runs'}", markup=False, highlight=False, soft_wrap=True)
        for name in names:
            folder = output / "runs" / name
            try:
                record = RunRecord.read(folder)
                words = f"{state_of(folder, record):<12} {record.started}"
            except ArtifactError as fault:  # the others are shown
                words = f"{'unreadable':<12} {escape(f'{fault.where}: {fault.message}')}"
            console.print(f"{escape(name):<20} {words}", highlight=False, soft_wrap=True)
        return
    _show_one(console, run_folder(output, run))


def _show_one(console: Console, folder: Path) -> None:
    record = as_it_is(folder, RunRecord.read(folder))
    console.print(f"[bold]{escape(folder.name)}[/]  {record.state}", highlight=False)
    show_stages(console, record, slurm_jobs.states(folder))
    if isinstance(store := record.config.get("artifacts"), str):
        console.print(f"store: {store}", markup=False, highlight=False, soft_wrap=True)
    for name, stage in record.stages.items():
        if stage.state in (RUNNING, KILLED):
            progress = progress_line(Progress.read(work_folder(folder, name, stage)))
            words = progress if stage.state == RUNNING else f"killed in the phase '{progress}'"
            console.print(f"{name}: {words}", markup=False, highlight=False)
        if stage.state == "failed":
            console.print(f"log: {folder / name / 'log.txt'}", markup=False, highlight=False, soft_wrap=True)
    for line in explanation(folder, record):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    show_results(console, folder, record)
    show_doubts(console, folder, record)
