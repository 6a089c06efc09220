"""``align status``: the state of runs; with ``--follow``, of one until it ends."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from alignment.commands.shared.arguments import add_output, runs_of
from alignment.commands.shared.following import FollowedRun, current_run, messages_of, run_folder, run_names
from alignment.core.errors import ArtifactError
from alignment.pipeline.backends import slurm_jobs
from alignment.pipeline.execute.display import Display, showing
from alignment.pipeline.execute.run_state import as_it_is, explanation
from alignment.pipeline.execute.run_table import progress_line
from alignment.pipeline.execute.run_view import KILLED, RUNNING, UNKNOWN, RunView, work_folder
from alignment.pipeline.execute.summary import show_doubts, show_results, show_stages
from alignment.records.run import RunRecord
from alignment.records.worker import Progress
from alignment.report.doubts import is_smoke


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One run, or all."""
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help="a run's name or its recipe's path; without it, all runs are listed"
    )
    parser.add_argument(
        "--follow", action="store_true", help="show RUN, or the current run, until it ends; Ctrl-C does not end the run"
    )
    add_output(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Shows how they stand; returns the exit code."""
    output, runs = runs_of(arguments, *filter(None, [arguments.run]))
    (follow if arguments.follow else show_status)(console, output, runs[0] if runs else None)
    return 0


def show_status(console: Console, output: Path, run: str | None) -> None:
    """Prints one run in full, or a line for each run under ``output/runs``. Raises ConfigError: there is no such run;
    the error suggests one."""
    if run is not None:
        _show_one(console, run_folder(output, run))
        return
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    names = run_names(output)
    if not names:
        say(f"no runs under {output / 'runs'}")
    for folder in (output / "runs" / name for name in names):
        try:
            record = RunRecord.read(folder)
            words = f"{as_it_is(folder, record).state:<12} {record.started}"
        except ArtifactError as fault:  # the others are shown
            words = f"{'unreadable':<12} {fault.where}: {fault.message}"
        say(f"{folder.name:<20} {words}")


def _show_one(console: Console, folder: Path) -> None:
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    record = as_it_is(folder, RunRecord.read(folder))
    console.print(f"[bold]{escape(folder.name)}[/]  {record.state}", highlight=False)
    show_stages(console, record, slurm_jobs.states(folder))
    if isinstance(store := record.config.get("artifacts"), str):
        say(f"store: {store}")
    for name, stage in record.stages.items():
        if stage.state in (RUNNING, KILLED):
            progress = progress_line(Progress.read(work_folder(folder, name, stage)))
            say(f"{name}: {progress}" if stage.state == RUNNING else f"{name}: killed in the phase '{progress}'")
        if stage.state == "failed":
            say(f"log: {folder / name / 'log.txt'}")
    for line in explanation(folder, record):
        say(line)
    show_results(console, folder, record)
    show_doubts(console, folder, record)


POLL_SECONDS = 0.5


def follow(console: Console, output: Path, run: str | None) -> None:
    """Shows a run, or the one that goes on, until it has ended, and then its results. Ctrl-C does not end the run.
    Raises ConfigError, ArtifactError."""
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    folder = current_run(output) if run is None else run_folder(output, run)
    followed = FollowedRun(folder)
    try:
        with showing(console, followed.reader) as display:
            last = _to_the_end(display, followed)
    except KeyboardInterrupt:
        say(f"{folder.name} continues; `align status {folder.name}` shows its progress")
        return
    for line in (f"{folder.name}: {last.state}", *explanation(folder, last.record)):
        say(line)
    record = RunRecord.read(folder)
    show_results(console, folder, record)
    if is_smoke(record.profile):  # other doubts were printed as the stages ended
        show_doubts(console, folder, record)


def _to_the_end(display: Display, run: FollowedRun) -> RunView:
    """Shows the run until it has ended; returns what was shown last."""
    ended = set[tuple[str, str]]()
    was_known = True
    while True:
        view = display.poll()
        for stage in view.stages:  # what stages that have ended say, once
            if stage.state in ("done", "reused", "failed") and (stage.name, stage.state) not in ended:
                ended.add((stage.name, stage.state))
                for message in messages_of(run.folder, RunRecord.read(run.folder), stage):
                    display.note(message)
        if not run.goes_on(view.state):
            return view
        if view.state == UNKNOWN and was_known:
            for line in explanation(run.folder, view.record):
                display.note(line)
        was_known = view.state != UNKNOWN
        time.sleep(POLL_SECONDS)
        reasons = run.reasons()
        for stage in view.stages:
            display.wait(stage.name, reasons.get(stage.name, ""))
