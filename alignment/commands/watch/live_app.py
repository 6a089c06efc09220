"""The page that follows a run, as a web application: where its stages are, and its report as far as it goes.

It only reads. A script of its own asks every few seconds how the run is, and takes over a new report in place; without
scripts the page loads itself again.
"""

from __future__ import annotations

import hashlib
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from alignment.commands.shared.following import FollowedRun
from alignment.commands.shared.page_server import assets, guarded
from alignment.core.errors import AlignmentError
from alignment.core.wording import clock_face, time_taken
from alignment.pipeline.execute.run_state import explanation
from alignment.pipeline.execute.run_table import figure, sparkline, speed, steps
from alignment.pipeline.execute.run_view import KILLED, StageView, work_folder
from alignment.records.run import FILE, RunRecord
from alignment.records.training import METRICS
from alignment.records.worker import STATUS
from alignment.report.kit.pages import environment
from alignment.report.kit.text import prose
from alignment.report.run_page.render import main_part

NUM_SAMPLES = 12
REPORT_SECONDS = 10.0
"""Least time between two drawings of the report: they take the processor from the run."""
_CURVE_CELLS = 40
_PACKAGE = "alignment.commands.watch"


def application(folder: Path, token: str) -> ASGIApp:
    """The application for the run in ``folder``."""
    pages = _LivePages(folder)
    stacked = environment("alignment.report").get_template("stacked.css.j2").render()
    routes = [Route("/", pages.page), Route("/status", pages.status)]
    routes += assets(_PACKAGE, "watch.css", "watch.js", stacked)
    return guarded(routes, token, command="align watch")


class _LivePages:
    """What the addresses of the application answer. Requests are answered in threads, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._run = FollowedRun(folder)
        self._templates = environment(_PACKAGE)
        self._lock = threading.Lock()
        self._revision = ""
        self._main = Markup("")
        self._drawn = 0.0

    def page(self, _: Request) -> Response:
        with self._lock:
            return self._answer("page.html.j2", with_report=True)

    def status(self, _: Request) -> Response:
        with self._lock:
            return self._answer("status.html.j2", with_report=False)

    def _answer(self, template: str, *, with_report: bool) -> Response:
        try:
            view = self._run.reader.look(self._run.reasons())
            is_over = not self._run.goes_on(view.state)
            revision = self._revision_of_now(is_over=is_over)
            if with_report and (revision != self._revision or not self._main):
                # Safe: the report's own templates have escaped it.
                killed = [stage.name for stage in view.stages if stage.state == KILLED]
                part = main_part(self._folder, num_samples=NUM_SAMPLES, state=view.state, killed=killed)
                self._main = Markup(part)
                self._revision, self._drawn = revision, time.monotonic()
        except (AlignmentError, OSError) as error:
            problem = self._templates.get_template("problem.html.j2").render(problem=prose(error))
            return HTMLResponse(problem, status_code=503)
        html = self._templates.get_template(template).render(
            run=self._folder.name,
            view=view,
            explanation=explanation(self._folder, view.record),
            rows=[_row(stage) for stage in view.stages],
            revision=revision,
            is_over=is_over,
            main=self._main,
        )
        return HTMLResponse(html)

    def _revision_of_now(self, *, is_over: bool) -> str:
        """A name for what the report would be drawn from. It changes every few seconds at most while a run goes on."""
        if self._revision and not is_over and time.monotonic() - self._drawn < REPORT_SECONDS:
            return self._revision
        record = RunRecord.read(self._folder)
        files = [self._folder / FILE]
        for name, entry in record.stages.items():
            work = work_folder(self._folder, name, entry)
            files += [self._folder / name / STATUS, work / "content" / METRICS]
        return hashlib.sha256(repr([is_over, *map(_stamp, files)]).encode()).hexdigest()[:16]


def _stamp(file: Path) -> tuple[int, int]:
    with suppress(OSError):
        status = file.stat()
        return status.st_mtime_ns, status.st_size
    return 0, 0


def _row(stage: StageView) -> dict[str, Any]:
    """A stage as the page shows it; ``share`` is how much of its steps is done, from 0 to 1."""
    row = {"name": stage.name, "state": stage.state, "share": None, "figure": "", "curve": "", "speed": ""}
    progress = stage.progress
    if progress is None:
        waits = f"waits: {stage.blocked}" if stage.blocked else stage.waits_for
        return {**row, "words": waits or time_taken(stage.seconds, stage.attempts)}
    words = [progress.phase, steps(progress)]
    if stage.seconds is not None:
        words.append(f"{clock_face(stage.seconds)} elapsed")
    if stage.seconds_left is not None:
        words.append(f"{clock_face(stage.seconds_left)} left")
    return {
        **row,
        "words": " · ".join(filter(None, words)),
        "share": min(1.0, progress.step / progress.total) if progress.total else None,
        "figure": figure(stage),
        "curve": "" if stage.curve is None else sparkline(stage.curve.values, _CURVE_CELLS),
        "speed": speed(stage),
    }
