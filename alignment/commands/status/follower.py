"""``align status --follow``: the view of ``align run``, from the files of a run of another process."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from alignment.commands.shared.following import FollowedRun, messages_of
from alignment.commands.shared.named_runs import current_run, run_folder
from alignment.pipeline.execute.display import Display, showing
from alignment.pipeline.execute.run_view import UNKNOWN, RunView
from alignment.pipeline.execute.summary import show_doubts, show_results
from alignment.records.run import RunRecord
from alignment.report.doubts import is_smoke

POLL_SECONDS = 0.5


def follow(console: Console, output: Path, run: str | None) -> None:
    """Shows a run, or the one that goes on, until it has ended, and then its results. Ctrl-C does not end the run.

    Raises:
        ConfigError: there is no such run.
        ArtifactError: the run's record cannot be read.
    """
    folder = current_run(output) if run is None else run_folder(output, run)
    followed = FollowedRun(folder)
    try:
        with showing(console, followed.reader) as display:
            last = _to_the_end(display, followed)
    except KeyboardInterrupt:
        console.print(
            f"{folder.name} continues; `align status {folder.name}` shows its progress", markup=False, highlight=False
        )
        return
    for line in (f"{folder.name}: {last.state}", *followed.explanation(last)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    record = RunRecord.read(folder)
    show_results(console, folder, record)
    if is_smoke(record.profile):  # other doubts were printed as the stages ended
        show_doubts(console, folder, record)


def _to_the_end(display: Display, run: FollowedRun) -> RunView:
    """Shows the run until it has ended; returns what was shown last.

    If it cannot be seen whether the run has ended, this is said once, and the run is followed.
    """
    ended = set[tuple[str, str]]()
    was_known = True
    while True:
        view = display.poll()
        _note_ends(display, run.folder, view, ended)
        if not run.goes_on(view.state):
            return view
        if view.state == UNKNOWN and was_known:
            for line in run.explanation(view):
                display.note(line)
        was_known = view.state != UNKNOWN
        time.sleep(POLL_SECONDS)
        reasons = run.reasons()
        for stage in view.stages:
            display.wait(stage.name, reasons.get(stage.name, ""))


def _note_ends(display: Display, folder: Path, view: RunView, noted: set[tuple[str, str]]) -> None:
    """Prints once what stages that have ended say."""
    for stage in view.stages:
        if stage.state in ("done", "reused", "failed") and (stage.name, stage.state) not in noted:
            noted.add((stage.name, stage.state))
            for message in messages_of(folder, RunRecord.read(folder), stage):
                display.note(message)
