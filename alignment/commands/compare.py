"""``align compare``: what differs between runs."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignment.commands.shared.arguments import add_output, runs_of
from alignment.commands.shared.following import run_folder, run_names
from alignment.core.errors import ConfigError
from alignment.core.files import can_be_a_file
from alignment.core.terminal import print_whole
from alignment.pipeline.execute.run_differences import (
    ComparedEvaluation,
    compared_evaluations,
    differences_from_first,
    judged_run,
)
from alignment.records.evaluation import Metric
from alignment.records.interval import Interval
from alignment.records.run import RunRecord
from alignment.report.comparison_page.comparison import MOST_RUNS, build_comparison
from alignment.report.kit.text import flat, setting_text
from alignment.report.run_page.run_files import read_run, side_by_side
from alignment.stages.base import ResultTable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two runs or more."""
    parser.description = (
        "Shows the settings that differ, the arms side by side, and how far the primary metric differs from the "
        "first run, paired by prompt."
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="names of runs, or their recipes' paths; the others are compared with the first",
    )
    parser.add_argument(
        "--html", metavar="FILE", help="also write a page with the curves in shared charts and with the answers"
    )
    add_output(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Compares them; returns the exit code."""
    output, runs = runs_of(arguments, *arguments.runs)
    compare(console, output, runs, html=arguments.html)
    return 0


NOT_SETTINGS = ("name", "output", "artifacts", "summary", "launch", "tracking")
"""Settings of a run that change no result."""

ABSENT = "–"


def compare(console: Console, output: Path, runs: Sequence[str], *, html: str | None = None) -> None:
    """Prints differing settings, arms side by side, and paired differences from the first run. Raises ConfigError."""
    page = None if html is None else Path(html).expanduser().absolute()
    if page is not None and len(runs) > MOST_RUNS:
        raise ConfigError(f"a page shows at most {MOST_RUNS} runs", where="--html", remedy="name fewer")
    if page is not None and not can_be_a_file(page):
        raise ConfigError(f"{html!r} cannot be a file", where="--html", remedy="name a file in a folder that exists")
    folders = _folders(output, runs)
    configs = [RunRecord.read(folder).config for folder in folders]
    settings = [{key: value for key, value in config.items() if key not in NOT_SETTINGS} for config in configs]
    differing = dict(_differing(settings))
    compared = compared_evaluations([judged_run(folder) for folder in folders])
    _show_settings(console, runs, differing)
    results = side_by_side([read_run(folder).tables for folder in folders])
    for evaluation in compared:
        if evaluation.primary is None:
            name = escape(evaluation.name or "the evaluation of these runs")
            console.print(f"\n{name} has no metric, so no arm is compared", highlight=False)
            continue
        _show_arms(console, runs, evaluation, evaluation.primary)
        _show_differences(console, runs, evaluation, evaluation.primary)
    if not compared and not results:
        console.print("\nnone of these runs was evaluated; add an evaluate stage", highlight=False)
    for stage, result in results:
        _show_result(console, runs, stage, result)
    if page is not None:
        differences = [difference for evaluation in compared for difference in differences_from_first(evaluation)]
        of_reports = [difference for difference in differences if not difference.evaluation]
        by_report = sorted(compared, key=lambda evaluation: not evaluation.shown[0])  # the page shows that one
        primary = next((evaluation.primary for evaluation in by_report if evaluation.primary is not None), None)
        build_comparison(folders, page, settings=differing, differences=of_reports, primary=primary)
        console.print(f"page: {page}", markup=False, highlight=False, soft_wrap=True)


def _folders(output: Path, runs: Sequence[str]) -> list[Path]:
    if twice := next((run for run in runs if runs.count(run) > 1), None):
        raise ConfigError("is named twice", where=twice, remedy="name each once")
    if len(runs) < 2:
        remedy = f"there are: {', '.join(run_names(output)) or 'none'}"
        raise ConfigError("name two runs or more", where=", ".join(runs), remedy=remedy)
    return [run_folder(output, run) for run in runs]


def _differing(settings_of_runs: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Yields every setting that differs between the runs that have it, with the value in each run."""
    flattened = [flat(settings) for settings in settings_of_runs]
    stages = {name for settings in settings_of_runs for name in settings["stages"]}
    lacking = {name for name in stages if any(name not in settings["stages"] for settings in settings_of_runs)}
    named_stages = set()
    for key in dict.fromkeys(key for settings in flattened for key in settings):
        stage = _stage_of(key, stages)
        if stage in lacking and stage not in named_stages:
            named_stages.add(stage)
            yield (
                f"stages.{stage}",
                [settings["stages"].get(stage, {}).get("kind", ABSENT) for settings in settings_of_runs],
            )
        values = [setting_text(settings[key]) if key in settings else ABSENT for settings in flattened]
        pairs = zip(values, settings_of_runs, strict=True)
        counted = [value for value, settings in pairs if not stage or stage in settings["stages"]]
        if len(set(counted)) > 1:
            yield key, values


def _stage_of(key: str, stages: Collection[str]) -> str:
    """The stage whose setting ``key`` is, or an empty text. The name of a stage may have dots: ``stages.ppo.v2.lr``."""
    named = [name for name in stages if f"{key}.".startswith(f"stages.{name}.")]
    return max(named, key=len, default="")


def _show_settings(console: Console, runs: Sequence[str], differing: dict[str, list[str]]) -> None:
    if not differing:
        console.print("no setting differs", highlight=False)
        return
    table = _table("setting", *runs)
    for key, values in differing.items():
        table.add_row(escape(key), *map(escape, values))
    print_whole(console, table)


def _show_arms(console: Console, runs: Sequence[str], evaluation: ComparedEvaluation, primary: Metric) -> None:
    stage = f"{evaluation.name}: " if evaluation.name else ""
    table = _table(f"{escape(stage + primary.name)}, 95 %", *runs)
    for name in dict.fromkeys(name for arms in evaluation.arms for name in arms):
        values = [arms[name].arm.metrics.get(primary.name) if name in arms else None for arms in evaluation.arms]
        table.add_row(escape(name.removeprefix("stage:")), *map(_mean_and_bounds, values))
    console.print()
    print_whole(console, table)


def _mean_and_bounds(value: Interval | None) -> str:
    if value is None:
        return ABSENT
    return f"{value.mean:.3f}" + (f" ({value.bounds[0]:.3f}–{value.bounds[1]:.3f})" if value.bounds else "")


def _show_differences(console: Console, runs: Sequence[str], evaluation: ComparedEvaluation, primary: Metric) -> None:
    for difference in differences_from_first(evaluation):
        if difference.metric.name != primary.name:
            continue
        stage = f" in {evaluation.name}" if evaluation.name else ""
        label = f"{difference.arm.removeprefix('stage:')}{stage}: {runs[difference.run]} against {runs[0]}"
        if difference.interval is None:
            line = f"{label}: evaluated on different prompts, so the two cannot be compared"
        else:
            low, high = difference.interval.bounds or (difference.interval.mean, difference.interval.mean)
            verdict = "the same on every prompt" if difference.none_at_all else difference.verdict
            interval = f"{difference.interval.mean:+.3f} ({low:+.3f} to {high:+.3f}){difference.p_in_words}"
            line = f"{label}: {interval}, {verdict}{difference.without}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _show_result(console: Console, runs: Sequence[str], stage: str, result: ResultTable) -> None:
    """A table that a kind of stage brings, with the arms of all runs as columns."""
    headings = [f"{runs[int(key.partition('/')[0])]}: {heading}" for key, heading in result.columns.items()]
    table = _table(escape(f"{stage}: {result.title}"), *map(escape, headings))
    for label, cells in result.rows:
        table.add_row(escape(label), *(escape(f"{cell.text} {cell.bounds}".rstrip()) for cell in cells))
    console.print()
    print_whole(console, table)


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title)
    return table
