"""``align preview``: the rows that each stage would train on."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from alignment.commands.shared.arguments import add_recipe, recipe_of, run_worker
from alignment.core.artifacts import EVALUATION
from alignment.core.errors import ConfigError
from alignment.core.files import can_be_a_file
from alignment.pipeline.execute import worker_protocol
from alignment.pipeline.execute.display import announcer
from alignment.pipeline.execute.stored_results import with_models
from alignment.pipeline.plan.plan import PlannedStage, make_plan
from alignment.stages.registry import kind_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe with overrides, and how much of it to show."""
    add_recipe(parser)
    parser.add_argument("--stage", help="only this stage")
    parser.add_argument("--rows", type=int, default=2, help="rows of each stage (default: 2)")
    parser.add_argument("--html", metavar="FILE", help="write the rows to this HTML page as well")


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Shows the rows; returns the exit code."""
    options = {name: getattr(arguments, name) for name in ("stage", "rows", "html")}
    return show_preview(console, recipe_of(arguments), arguments.overrides, **options)


def show_preview(
    console: Console, recipe: str, overrides: Sequence[str], *, stage: str | None, rows: int, html: str | None
) -> int:
    """Prints the rows, and writes the same to the file ``html`` if it is given; returns the exit code. Raises
    AlignmentError: the plan has a fault, or there is no such stage."""
    if html is not None and not can_be_a_file(Path(html)):
        raise ConfigError(f"{html!r} cannot be a file", where="--html", remedy="name a file in a folder that exists")
    plan = make_plan(recipe, overrides)
    trained = [planned.name for planned in plan.stages if kind_of(planned.config).trains]
    if not trained:
        remedy = "`align doctor FILE` checks the rows of a data file"
        message = "no stage of this recipe trains on rows, so there is nothing to preview"
        raise ConfigError(message, where="stages", remedy=remedy)
    if stage is not None and stage not in trained:
        raise ConfigError(f"{stage!r} is not a training stage; one of: {', '.join(trained)}", where="--stage")
    plan = with_models(plan, announcer(console), stages=plan.stages)
    chosen = [planned for planned in plan.stages if planned.name in ([stage] if stage else trained)]
    for planned in (planned for planned in chosen if planned.unmade):
        makers = " and ".join(planned.unmade)
        console.print(f"{planned.name}: its rows do not exist until {makers} has run", markup=False, highlight=False)
    shown = [planned for planned in chosen if not planned.unmade]
    if not shown:
        return 0
    with tempfile.TemporaryDirectory() as folder:

        def file_of(planned: PlannedStage) -> str:
            own = Path(folder) / planned.name
            return str(worker_protocol.write_stage_file(plan, planned, plan.config.launch, git_commit="", folder=own))

        argv = [sys.executable, "-m", "alignment.commands.preview.worker", *map(file_of, shown), "--rows", str(rows)]
        argv += ["--html", html] if html else []
        made = [planned for planned in plan.stages if not planned.unmade]
        evaluation = next((planned for planned in made if kind_of(planned.config).produces == EVALUATION), None)
        argv += ["--against", file_of(evaluation)] if evaluation else []
        return run_worker(argv, verb="preview")
