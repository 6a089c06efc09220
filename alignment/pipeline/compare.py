"""``align compare``: what differs between runs, in their settings and in what came of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignment.config.near import suggestion
from alignment.errors import ConfigError
from alignment.pipeline import paired
from alignment.pipeline.record import FILE, read_record

NOT_SETTINGS = ("name", "output", "summary", "launch", "tracking")
"""What a run is told that changes no result."""


def compare(console: Console, output: Path, runs: Sequence[str]) -> None:
    """Settings that differ, arms side by side, and differences from the first run, prompt by prompt.

    Raises:
        ConfigError: fewer than two runs, or one that is not there.
    """
    folders = _folders(output, runs)
    records = [read_record(folder) for folder in folders]
    _show_settings(console, runs, [_flat(_settings(record["config"])) for record in records])
    told = [_arms(folder) for folder in folders]
    if not any(told):
        console.print("\nnone of them was evaluated; add an evaluate stage", highlight=False)
        return
    _show_arms(console, runs, told)
    _show_differences(console, runs, told)


def _folders(output: Path, runs: Sequence[str]) -> list[Path]:
    known = sorted(path.parent.name for path in (output / "runs").glob(f"*/{FILE}"))
    if len(set(runs)) < 2:
        raise ConfigError("name two runs or more", where="RUN", remedy=f"there are: {', '.join(known) or 'none'}")
    for run in runs:
        if run not in known:
            raise ConfigError(f"no run '{run}' under {output / 'runs'}; {suggestion(run, known)}", where="RUN")
    return [output / "runs" / run for run in runs]


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in NOT_SETTINGS}


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    if not isinstance(tree, Mapping):
        return {path: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{path}.{key}" if path else str(key))
    return found


def _show_settings(console: Console, runs: Sequence[str], told: Sequence[dict[str, Any]]) -> None:
    keys = list(dict.fromkeys(key for one in told for key in one))
    differ = [key for key in keys if any(one.get(key) != told[0].get(key) for one in told)]
    if not differ:
        console.print("no setting differs", highlight=False)
        return
    table = _table("setting", *runs)
    for key in differ:
        table.add_row(escape(key), *(escape(str(one.get(key, "–"))) for one in told))
    console.print(table)


def _arms(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, float]]]:
    """Each arm's line of the evaluation, and its gold by prompt."""
    found = {}
    for artifact in paired.evaluations(folder).values():
        for arm in json.loads((artifact / "evaluation.json").read_text(encoding="utf-8"))["arms"]:
            found[arm["name"]] = (arm, paired.gold(artifact, arm["name"]))
    return found


def _show_arms(
    console: Console, runs: Sequence[str], told: Sequence[dict[str, tuple[dict[str, Any], dict[str, float]]]]
) -> None:
    table = _table("gold, 95 %", *runs)
    for name in dict.fromkeys(name for one in told for name in one):
        cells = []
        for one in told:
            figure = one[name][0]["gold"] if name in one else None
            cells.append("–" if figure is None else f"{figure['mean']:.3f} ({figure['low']:.3f}–{figure['high']:.3f})")
        table.add_row(escape(name.removeprefix("stage:")), *cells)
    console.print()
    console.print(table)


def _show_differences(
    console: Console, runs: Sequence[str], told: Sequence[dict[str, tuple[dict[str, Any], dict[str, float]]]]
) -> None:
    for run, one in zip(runs[1:], told[1:], strict=True):
        for name in [name for name in one if name in told[0]]:
            found = paired.difference(one[name][1], told[0][name][1])
            label = f"{name.removeprefix('stage:')}: {run} against {runs[0]}"
            if found is None:
                line = f"{label}: judged on other prompts, which cannot be compared"
            else:
                verdict = "no real difference"
                if found.excludes_zero():
                    verdict = "better" if found.mean > 0 else "worse"
                line = f"{label}: {found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f}), {verdict}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title)
    return table
