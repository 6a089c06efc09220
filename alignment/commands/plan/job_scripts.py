"""``align plan --scripts``: the job files that a run with these settings would submit to Slurm, without submitting."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from alignment.core.errors import ConfigError
from alignment.core.files import new_folder, write_text
from alignment.pipeline.backends import slurm, slurm_jobs
from alignment.pipeline.backends.slurm_job_file import TEMPLATE
from alignment.pipeline.plan.plan import Plan

OPTION = "--scripts"


def job_scripts(plan: Plan, to: str) -> dict[Path, str]:
    """Content by file, in a new folder ``to``, for each stage that has to run, in the order of submission.

    Raises:
        ConfigError: stages do not run as Slurm jobs, ``to`` exists already, or a value is not allowed in a job file.
    """
    if slurm.submission(plan.config.launch) is None:
        raise ConfigError(
            "this plan does not run on Slurm, so there are no job scripts",
            where=OPTION,
            remedy="add launch/backend=slurm, or leave out --scripts",
        )
    folder = new_folder(to, option=OPTION)
    files = slurm_jobs.job_files(plan, [stage for stage in plan.stages if stage.has_to_run])
    return {folder / f"{stage}{TEMPLATE.suffix}": text for stage, text in files.items()}


def write_scripts(console: Console, scripts: Mapping[Path, str]) -> None:
    """Writes the files and names them."""
    for file, text in scripts.items():
        file.parent.mkdir(exist_ok=True)
        write_text(file, text)
        _print(console, f"written: {file}")
    if scripts:
        _print(console, "a run would submit them in this order; each job waits until the one before has ended well")
    else:
        _print(console, "no job scripts, because nothing has to run")


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
