"""``align compare``: what differs between runs, in their settings and in what came of them."""

from __future__ import annotations

import json
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
from alignment.pipeline.execute.record import FILE, read_record
from alignment.report.comparison_page.comparison import GOLD, MOST_RUNS, build_comparison
from alignment.report.comparison_page.setting_rows import flat, shown
from alignment.report.run_page.run_records import Difference

NOT_SETTINGS = ("name", "output", "summary", "launch", "tracking")
"""What a run is told that changes no result."""

ABSENT = "–"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Judged:
    """An arm of a run: its line of the evaluation, and the figures of its answers by prompt."""

    row: dict[str, Any]
    scores: dict[str, dict[str, float]]


def compare(console: Console, output: Path, runs: Sequence[str], *, html: str | None = None) -> None:
    """Settings that differ, arms side by side, and differences from the first run, prompt by prompt.

    Raises:
        ConfigError: fewer than two runs, one that is not there, or a page that cannot be written to ``html``.
    """
    page = None if html is None else _page(html, runs)
    folders = _folders(output, runs)
    differing = dict(_differing([_settings(read_record(folder)["config"]) for folder in folders]))
    judged = [_arms(folder) for folder in folders]
    differences = list(_differences(judged))
    _show_settings(console, runs, differing)
    if any(judged):
        _show_arms(console, runs, judged)
        _show_differences(console, runs, differences)
    else:
        console.print("\nnone of them was evaluated; add an evaluate stage", highlight=False)
    if page is not None:
        build_comparison(folders, page, settings=differing, differences=differences)
        console.print(f"page: {page}", markup=False, highlight=False, soft_wrap=True)


def _page(html: str, runs: Sequence[str]) -> Path:
    if len(runs) > MOST_RUNS:
        raise ConfigError(f"a page holds {MOST_RUNS} runs at most", where="--html", remedy="name fewer")
    path = Path(html).expanduser().absolute()
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{html!r} cannot be a file", where="--html", remedy="name a file in a folder that is there")
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


def _differing(told: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """The value in each run of every setting that differs between those that have it.

    Of a stage that some runs do not have, it is said which do.
    """
    every = [flat(one) for one in told]
    stages = {name for one in told for name in one["stages"]}
    lacking = {name for name in stages if any(name not in one["stages"] for one in told)}
    said = set()
    for key in dict.fromkeys(key for one in every for key in one):
        stage = key.split(".")[1] if key.startswith("stages.") else ""
        if stage in lacking and stage not in said:
            said.add(stage)
            yield f"stages.{stage}", [one["stages"].get(stage, {}).get("kind", ABSENT) for one in told]
        values = [shown(one[key]) if key in one else ABSENT for one in every]
        counted = [value for value, one in zip(values, told, strict=True) if not stage or stage in one["stages"]]
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
    found = {}
    for artifact in paired_differences.evaluations(folder).values():
        for row in json.loads((artifact / "evaluation.json").read_text(encoding="utf-8"))["arms"]:
            found[row["name"]] = _Judged(row=row, scores=paired_differences.scores(artifact, row["name"]))
    return found


def _show_arms(console: Console, runs: Sequence[str], judged: Sequence[dict[str, _Judged]]) -> None:
    table = _table("gold, 95 %", *runs)
    for name in dict.fromkeys(name for one in judged for name in one):
        cells = []
        for one in judged:
            figure = one[name].row.get("gold") if name in one else None
            cells.append("–" if figure is None else f"{figure['mean']:.3f} ({figure['low']:.3f}–{figure['high']:.3f})")
        table.add_row(escape(name.removeprefix("stage:")), *cells)
    console.print()
    console.print(table)


def _differences(judged: Sequence[dict[str, _Judged]]) -> Iterator[Difference]:
    """What each other run has less the first, in every figure of the answers of an arm that both have."""
    for place, one in enumerate(judged[1:], start=1):
        for name in [name for name in one if name in judged[0]]:
            ours, theirs = one[name].scores, judged[0][name].scores
            for figure in [figure for figure in ours if figure in theirs]:
                found = paired_differences.difference(ours[figure], theirs[figure])
                yield Difference(run=place, arm=name, figure=figure, interval=found)


def _show_differences(console: Console, runs: Sequence[str], differences: Sequence[Difference]) -> None:
    for one in differences:
        if one.figure != GOLD:
            continue
        label = f"{one.arm.removeprefix('stage:')}: {runs[one.run]} against {runs[0]}"
        found = one.interval
        if found is None:
            line = f"{label}: judged on other prompts, which cannot be compared"
        else:
            verdict = "the same on every prompt" if one.none_at_all else "no real difference"
            if one.real:
                verdict = "better" if found.mean > 0 else "worse"
            line = f"{label}: {found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f}), {verdict}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title)
    return table
