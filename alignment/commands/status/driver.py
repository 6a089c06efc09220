"""The state of runs, read from their files, whether or not they are still running."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from alignment.config.did_you_mean import suggestion
from alignment.core.errors import ConfigError
from alignment.pipeline.backends import slurm_jobs
from alignment.pipeline.execute.run_state import state_of
from alignment.pipeline.execute.summary import progress_line, show_results, show_stages
from alignment.records.run import FILE, RunRecord
from alignment.records.worker import Progress


def show_status(console: Console, output: Path, run: str | None) -> None:
    """Prints one run in full, or a line for each run under ``output/runs``.

    Raises:
        ConfigError: there is no such run; the error suggests one.
    """
    folders = sorted(path.parent for path in (output / "runs").glob(f"*/{FILE}"))
    if run is None:
        if not folders:
            console.print(f"no runs under {output / 'runs'}", markup=False, highlight=False, soft_wrap=True)
        for folder in folders:
            record = RunRecord.read(folder)
            console.print(f"{escape(folder.name):<20} {state_of(folder, record):<12} {record.started}", highlight=False)
        return
    names = [folder.name for folder in folders]
    if run not in names:
        raise ConfigError(f"no run '{run}' under {output / 'runs'}; {suggestion(run, names)}", where="run")
    _show_one(console, output / "runs" / run)


def _show_one(console: Console, folder: Path) -> None:
    record = RunRecord.read(folder)
    console.print(f"[bold]{escape(folder.name)}[/]  {state_of(folder, record)}", highlight=False)
    show_stages(console, record, slurm_jobs.states(folder))
    for name, stage in record.stages.items():
        if stage.state == "running":
            artifact = Path(stage.artifact)
            progress = Progress.read(artifact.with_name(f"{artifact.name}.work"))
            console.print(f"{escape(name)}: {progress_line(progress)}", highlight=False)
        if stage.state == "failed":
            console.print(f"log: {folder / name / 'log.txt'}", markup=False, highlight=False, soft_wrap=True)
    show_results(console, folder, record)
