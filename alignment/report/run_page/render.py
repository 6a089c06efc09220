"""Assembles the page about a run and writes it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment.core.errors import ConfigError
from alignment.records.evaluation import Evaluation
from alignment.report.kit.pages import template, write_page
from alignment.report.run_page import run_tables
from alignment.report.run_page.chain import chain
from alignment.report.run_page.curves import charts, num_gaps, size_curves
from alignment.report.run_page.run_files import read_run
from alignment.report.run_page.run_records import Run, Stage
from alignment.report.run_page.run_tables import card_view
from alignment.report.run_page.shown_rows import choose, people_rows, rule
from alignment.report.run_page.verdict import judge
from alignment.stages.registry import trains

NUM_OPEN_SAMPLES = 3
"""Samples shown in full at once; the others open with a click, so that the page stays readable."""


def build(run_folder: Path, output: Path, *, num_samples: int) -> None:
    """Writes the report about the run in ``run_folder`` (``runs/<run>``) to the file ``output``. What the run lacks is
    stated on the page. The same files give the same bytes. Raises ArtifactError: run.json is missing or unreadable;
    ConfigError: ``num_samples`` is negative."""
    if num_samples < 0:
        raise ConfigError(f"{num_samples} is negative", where="num_samples", remedy="give 0 or more")
    write_page(page(read_run(run_folder), num_samples=num_samples), output)


def page(run: Run, *, num_samples: int) -> str:
    return template("report.html.j2").render(_drawn(run, num_samples))


def main_part(run_folder: Path, *, num_samples: int, state: str, killed: Collection[str] = ()) -> str:
    """The element ``main`` of the report about a run, for a page with another frame. ``state`` is that of the run, and
    ``killed`` names its killed stages: a run that was killed could not record them. Raises ArtifactError: run.json is
    missing or unreadable."""
    run = read_run(run_folder)
    stages = [replace(stage, state="killed") if stage.name in killed else stage for stage in run.stages]
    run = replace(run, record=replace(run.record, state=state), stages=stages)
    return template("report_main.html.j2").render(_drawn(run, num_samples))


def _drawn(run: Run, num_samples: int) -> dict[str, Any]:
    primary = run.evaluation.primary if run.evaluation else None
    chosen = choose(run.samples, num_samples, primary=primary)
    return {
        "run": run,
        "facts": run_tables.facts(run),
        "verdict": judge(run),
        "chain": chain(run),
        "evaluation": run.evaluation,
        "evaluated": _evaluated(run.evaluation),
        "cards": [card_view(card) for card in run.cards],
        "sizes": size_curves(run),
        "learning": [(stage, charts(stage), _curve_notes(stage)) for stage in run.stages if _has_curves(stage)],
        "left_out": [stage for stage in run.stages if stage.left_out],
        "chosen": chosen,
        "num_open": NUM_OPEN_SAMPLES,
        "rule": rule(primary),
        "label": (run.evaluation or Evaluation()).label,
        "usage": run_tables.usage_rows(run),
        "lineage": [(stage, run_tables.lineage(stage)) for stage in run.stages],
        "settings": [(stage, run_tables.settings(stage)) for stage in run.stages],
        "command": run_tables.command(run),
    }


def _evaluated(evaluation: Evaluation | None) -> run_tables.Row | None:
    if evaluation is None:
        return None
    comparisons, axis = run_tables.comparison_rows(evaluation)
    return {
        "plot": run_tables.primary_plot(evaluation),
        "arms": run_tables.arm_table(evaluation),
        "comparisons": comparisons,
        "axis": axis,
        "other_comparisons": run_tables.other_comparison_rows(evaluation),
        "judged": run_tables.judged_rows(evaluation),
        "judged_by_people": people_rows(evaluation),
        "tasks": run_tables.task_rows(evaluation),
        "turns": run_tables.turn_rows(evaluation),
    }


def _has_curves(stage: Stage) -> bool:
    return bool(stage.metrics or stage.notes) or trains(stage.kind)


def _curve_notes(stage: Stage) -> list[str]:
    notes = list(stage.notes)
    if not stage.metrics:
        waits = stage.state == "waiting"
        notes.append("Not started." if waits else "It left no metrics.jsonl, so there are no curves.")
    elif not charts(stage):
        notes.append("Its metrics.jsonl contains none of the metrics that are drawn for this kind of stage.")
    if gaps := num_gaps(stage):
        notes.append(f"{gaps} value{'s were' if gaps > 1 else ' was'} not finite; the lines have gaps there.")
    return notes
