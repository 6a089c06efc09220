"""``align compare``: the differences between runs, in their settings and in their results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignment.config.did_you_mean import suggestion
from alignment.core.errors import ConfigError
from alignment.pipeline.execute import paired_differences
from alignment.records.evaluation import ArmResult, Evaluation, Metric
from alignment.records.interval import Interval
from alignment.records.run import FILE, RunRecord
from alignment.report.comparison_page.comparison import MOST_RUNS, build_comparison
from alignment.report.comparison_page.setting_rows import flat, shown
from alignment.report.run_page.run_files import read_run
from alignment.report.run_page.run_records import Difference
from alignment.report.run_page.table_sections import side_by_side
from alignment.stages.base import ResultTable

NOT_SETTINGS = ("name", "output", "summary", "launch", "tracking")
"""Settings of a run that change no result."""

ABSENT = "–"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Judged:
    """An arm of a run, its evaluation's metrics and prompts, and the scores of its answers by metric and prompt."""

    arm: ArmResult
    metrics: dict[str, Metric]
    primary: Metric | None
    prompts: set[str]
    scores: dict[str, dict[str, float]]


def compare(console: Console, output: Path, runs: Sequence[str], *, html: str | None = None) -> None:
    """Prints differing settings, arms side by side, and paired differences from the first run.

    Raises:
        ConfigError: there are fewer than two runs, a run does not exist, or ``html`` cannot be written.
    """
    page = None if html is None else _page(html, runs)
    folders = _folders(output, runs)
    differing = dict(_differing([_settings(RunRecord.read(folder).config) for folder in folders]))
    judged = [_arms(folder) for folder in folders]
    primary = _primary(judged)
    differences = list(_differences(judged))
    _show_settings(console, runs, differing)
    results = side_by_side([read_run(folder).tables for folder in folders])
    if any(judged):
        _show_arms(console, runs, judged, primary)
        _show_differences(console, runs, differences, primary)
    elif not results:
        console.print("\nnone of these runs was evaluated; add an evaluate stage", highlight=False)
    for stage, result in results:
        _show_result(console, runs, stage, result)
    if page is not None:
        build_comparison(folders, page, settings=differing, differences=differences, primary=primary)
        console.print(f"page: {page}", markup=False, highlight=False, soft_wrap=True)


def _page(html: str, runs: Sequence[str]) -> Path:
    if len(runs) > MOST_RUNS:
        raise ConfigError(f"a page holds {MOST_RUNS} runs at most", where="--html", remedy="name fewer")
    path = Path(html).expanduser().absolute()
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{html!r} cannot be a file", where="--html", remedy="name a file in a folder that exists")
    return path


def _folders(output: Path, runs: Sequence[str]) -> list[Path]:
    known = sorted(path.parent.name for path in (output / "runs").glob(f"*/{FILE}"))
    if twice := next((run for run in runs if runs.count(run) > 1), None):
        raise ConfigError(f"the run {twice!r} is named twice", where="RUN", remedy="name each once")
    if len(runs) < 2:
        raise ConfigError("name two runs or more", where="RUN", remedy=f"there are: {', '.join(known) or 'none'}")
    for run in runs:
        if run not in known:
            raise ConfigError(f"no run '{run}' under {output / 'runs'}; {suggestion(run, known)}", where="RUN")
    return [output / "runs" / run for run in runs]


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in NOT_SETTINGS}


def _differing(settings_of_runs: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Yields every setting that differs between the runs that have it, with the value in each run.

    For a stage that some runs lack, it yields which runs have it.
    """
    flattened = [flat(settings) for settings in settings_of_runs]
    stages = {name for settings in settings_of_runs for name in settings["stages"]}
    lacking = {name for name in stages if any(name not in settings["stages"] for settings in settings_of_runs)}
    named_stages = set()
    for key in dict.fromkeys(key for settings in flattened for key in settings):
        stage = key.split(".")[1] if key.startswith("stages.") else ""
        if stage in lacking and stage not in named_stages:
            named_stages.add(stage)
            yield (
                f"stages.{stage}",
                [settings["stages"].get(stage, {}).get("kind", ABSENT) for settings in settings_of_runs],
            )
        values = [shown(settings[key]) if key in settings else ABSENT for settings in flattened]
        pairs = zip(values, settings_of_runs, strict=True)
        counted = [value for value, settings in pairs if not stage or stage in settings["stages"]]
        if len(set(counted)) > 1:
            yield key, values


def _show_settings(console: Console, runs: Sequence[str], differing: dict[str, list[str]]) -> None:
    if not differing:
        console.print("no setting differs", highlight=False)
        return
    table = _table("setting", *runs)
    for key, values in differing.items():
        table.add_row(escape(key), *map(escape, values))
    console.print(table)


def _arms(folder: Path) -> dict[str, _Judged]:
    """The arms of all evaluations of a run, by name."""
    arms = {}
    for artifact in paired_differences.evaluations(folder).values():
        evaluation = Evaluation.read(artifact)
        metrics = {metric.name: metric for metric in evaluation.metrics}
        prompts = paired_differences.prompts(artifact)
        for arm in evaluation.arms:
            scores = paired_differences.scores(artifact, arm.name)
            arms[arm.name] = _Judged(
                arm=arm, metrics=metrics, primary=evaluation.primary_metric, prompts=prompts, scores=scores
            )
    return arms


def _primary(judged: Sequence[dict[str, _Judged]]) -> Metric | None:
    """The metric by which runs are compared: the primary metric of the first run that has one."""
    return next((arm.primary for arms in judged for arm in arms.values() if arm.primary is not None), None)


def _show_arms(
    console: Console, runs: Sequence[str], judged: Sequence[dict[str, _Judged]], primary: Metric | None
) -> None:
    if primary is None:
        console.print("\nno evaluation of these runs has a metric, so no arm is compared", highlight=False)
        return
    table = _table(f"{escape(primary.name)}, 95 %", *runs)
    for name in dict.fromkeys(name for arms in judged for name in arms):
        means = [arms[name].arm.metrics.get(primary.name) if name in arms else None for arms in judged]
        table.add_row(escape(name.removeprefix("stage:")), *map(_mean_and_bounds, means))
    console.print()
    console.print(table)


def _mean_and_bounds(value: Interval | None) -> str:
    if value is None:
        return ABSENT
    return f"{value.mean:.3f}" + (f" ({value.bounds[0]:.3f}–{value.bounds[1]:.3f})" if value.bounds else "")


def _differences(judged: Sequence[dict[str, _Judged]]) -> Iterator[Difference]:
    """Yields the differences of each other run minus the first, in every metric of an arm that both have."""
    for run, arms in enumerate(judged[1:], start=1):
        for name in [name for name in arms if name in judged[0]]:
            this, first = arms[name], judged[0][name]
            for metric in [metric for metric in this.scores if metric in first.scores]:
                scores, others, unscored = this.scores[metric], first.scores[metric], 0
                if this.prompts == first.prompts:
                    scores, others, unscored = paired_differences.in_both(scores, others)
                yield Difference(
                    run=run,
                    arm=name,
                    metric=this.metrics.get(metric) or Metric(name=metric),
                    interval=paired_differences.difference(scores, others),
                    unscored=unscored,
                )


def _show_differences(
    console: Console, runs: Sequence[str], differences: Sequence[Difference], primary: Metric | None
) -> None:
    for difference in differences:
        if primary is None or difference.metric.name != primary.name:
            continue
        label = f"{difference.arm.removeprefix('stage:')}: {runs[difference.run]} against {runs[0]}"
        if difference.interval is None:
            line = f"{label}: judged on other prompts, which cannot be compared"
        else:
            low, high = difference.interval.bounds or (difference.interval.mean, difference.interval.mean)
            verdict = (
                "the same on every prompt" if difference.none_at_all else difference.metric.verdict(difference.interval)
            )
            interval = f"{difference.interval.mean:+.3f} ({low:+.3f} to {high:+.3f})"
            line = f"{label}: {interval}, {verdict}{difference.without}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _show_result(console: Console, runs: Sequence[str], stage: str, result: ResultTable) -> None:
    """A table that a kind of stage brings, with the arms of all runs as columns."""
    headings = [f"{runs[int(key.partition('/')[0])]}: {heading}" for key, heading in result.columns.items()]
    table = _table(escape(f"{stage}: {result.title}"), *map(escape, headings))
    for label, cells in result.rows:
        table.add_row(escape(label), *(escape(f"{cell.text} {cell.bounds}".rstrip()) for cell in cells))
    console.print()
    console.print(table)


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title)
    return table
