"""Runs beside each other as one HTML file: settings that differ, arms, curves laid over each other, answers, cost.

A run is called by its letter, A being the one that the others are compared with. What a run lacks is stated.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from alignment.records.evaluation import Metric
from alignment.records.interval import Interval
from alignment.report.comparison_page.shared_samples import rule, share
from alignment.report.kit import text
from alignment.report.kit.pages import template, write_page
from alignment.report.kit.plots import scale_axis, scale_of, swatch, whisker
from alignment.report.kit.render import NUM_OPEN_SAMPLES
from alignment.report.run_page import run_tables
from alignment.report.run_page.curves import Chart, overlaid
from alignment.report.run_page.run_files import read_run
from alignment.report.run_page.run_records import Difference, Run, Stage
from alignment.report.run_page.verdict import judge
from alignment.stages.registry import trains

MOST_RUNS = 8
"""As many as have a look of their own (``.runs`` in style.css)."""

NUM_SAMPLES = 12


def build_comparison(
    folders: Sequence[Path],
    output: Path,
    *,
    settings: Mapping[str, Sequence[str]],
    differences: Sequence[Difference],
    primary: Metric | None,
) -> None:
    """Writes the page about the runs in ``folders`` (at most ``MOST_RUNS``) to the file ``output``.

    ``settings`` are those that differ, with a value for each run; ``differences`` are taken from the first run.
    ``primary`` is the metric by which runs are compared, if there is any.

    Raises:
        ArtifactError: a run.json is missing or unreadable.
    """
    runs = [
        Told(look=look, letter=letter, run=read_run(folder))
        for look, (letter, folder) in enumerate(zip(string.ascii_uppercase, folders, strict=False))
    ]
    write_page(page(runs, settings=settings, differences=differences, primary=primary), output)


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """A run as the page calls and draws it."""

    look: int
    letter: str
    run: Run

    @property
    def swatch(self) -> Markup:
        """Its line and mark."""
        return swatch(self.look)

    @property
    def facts(self) -> dict[str, str]:
        """What it is, by heading."""
        return dict(run_tables.facts(self.run))

    @property
    def notes(self) -> list[str]:
        """What a reader must know of it."""
        return ([] if self.run.evaluation else [self.run.evaluation_note]) + judge(self.run).warnings


def page(
    runs: Sequence[Told],
    *,
    settings: Mapping[str, Sequence[str]],
    differences: Sequence[Difference],
    primary: Metric | None,
) -> str:
    """The page as HTML."""
    shared = share([one.run for one in runs], NUM_SAMPLES)
    by_primary = [one for one in differences if primary is not None and one.metric.name == primary.name]
    return template("comparison.html.j2").render(
        runs=runs,
        settings=[(text.name(key, limit=120), [text.prose(value) for value in told]) for key, told in settings.items()],
        lead=_lead(runs, by_primary, primary),
        sentences=[_sentence(runs, one) for one in by_primary],
        arms=_arms(runs),
        plots=None if primary is None else _primary_plots(runs, primary.name),
        blocks=_blocks(runs, differences, primary),
        curves=_curves(runs),
        shared=shared,
        rule=rule(None if primary is None else primary.name),
        num_open=NUM_OPEN_SAMPLES,
        costs=_costs(runs),
    )


# ---- what is said ---------------------------------------------------------------------------------------------------


def _lead(runs: Sequence[Told], differences: Sequence[Difference], primary: Metric | None) -> str:
    """``differences`` are those in the primary metric."""
    if not any(one.run.evaluation for one in runs):
        return "None of these runs was evaluated, so nothing can be said of which is better."
    if primary is None:
        return "No evaluation of these runs has a metric, so nothing can be said of which is better."
    if not differences:
        return f"No arm was scored by {primary.name} both in {runs[0].letter} and in another run, so none is compared."
    paired = [one for one in differences if one.interval is not None]
    if not paired:
        return f"The other runs were judged on other prompts than {runs[0].letter}, so no difference can be told."
    real = [one for one in paired if one.real]
    if not real:
        return f"No difference from {runs[0].letter} is shown: every interval includes zero."
    verb = "is" if len(real) == 1 else "are"
    return f"{len(real)} of {len(paired)} differences from {runs[0].letter} in {primary.name} {verb} real."


def _sentence(runs: Sequence[Told], one: Difference) -> str:
    label, letter, first = _label(one.arm), runs[one.run].letter, runs[0].letter
    found = one.interval
    if found is None:
        return f"{label}: {letter} was judged on other prompts than {first}, which cannot be compared."
    interval = f"{text.signed(found.mean)} in {one.metric.name} (95\u202f% interval {_bounds(found)})"
    if one.none_at_all:
        return f"{label}: the same {one.metric.name} in {letter} and {first} on every prompt."
    if not one.real:
        return f"{label}: a difference between {letter} and {first} is not shown: {interval}."
    return f"{label}: {letter} is really {one.metric.verdict(found)} than {first}: {interval}."


def _label(arm: str) -> str:
    return text.name(arm.removeprefix("stage:"), limit=48)


def _bounds(item: Interval) -> str:
    return "" if item.low is None or item.high is None else f"{text.signed(item.low)} to {text.signed(item.high)}"


# ---- arms -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmsTable:
    """``rows`` are (arm, run, cells); a cell is (figure, bounds) as text, and stands under a heading."""

    headings: list[str]
    rows: list[tuple[str, Told, list[tuple[str, str]]]]


def _arm_names(runs: Sequence[Told]) -> list[str]:
    return list(dict.fromkeys(arm.name for one in runs if one.run.evaluation for arm in one.run.evaluation.arms))


def _arms(runs: Sequence[Told]) -> ArmsTable:
    """Every figure that an evaluation holds of its arms; the runs of an arm stand below each other."""
    found = [
        (arm.label, one, arm.figures)
        for name in _arm_names(runs)
        for one in runs
        if one.run.evaluation
        for arm in one.run.evaluation.arms
        if arm.name == name
    ]
    headings = list(dict.fromkeys(heading for _, _, figures in found for heading in figures))
    return ArmsTable(
        headings=headings,
        rows=[(label, one, [_cell(figures.get(heading)) for heading in headings]) for label, one, figures in found],
    )


def _cell(item: Interval | None) -> tuple[str, str]:
    if item is None:
        return "–", ""
    digits = 1 if abs(item.mean) >= 10 else 2
    return text.number(item.mean, digits), run_tables.bounds(item, digits)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlotRow:
    """A row of an interval plot: a run's figure, or its difference from the first run's."""

    arm: str
    told: Told
    svg: Markup
    value: str
    bounds: str
    verdict: str = ""
    tone: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Rows on one axis; ``others`` are sentences about what could not be drawn."""

    title: str
    rows: list[PlotRow]
    axis: Markup
    others: list[str]


def _primary_plots(runs: Sequence[Told], metric: str) -> Block | None:
    """The metric of every arm in every run on one axis."""
    known = [
        (_label(name), one, arm.metrics[metric])
        for name in _arm_names(runs)
        for one in runs
        if one.run.evaluation
        for arm in one.run.evaluation.arms
        if arm.name == name and metric in arm.metrics
    ]
    if not known:
        return None
    scale = scale_of([mean for _, _, mean in known], within=(0.0, 1.0), include=None)
    rows = [
        PlotRow(
            arm=label,
            told=one,
            svg=whisker(mean, scale, tone=f"s{one.look}", rule=None),
            value=text.number(mean.mean),
            bounds=run_tables.bounds(mean),
        )
        for label, one, mean in known
    ]
    return Block(title=metric, rows=rows, axis=scale_axis(scale), others=[])


def _blocks(runs: Sequence[Told], differences: Sequence[Difference], primary: Metric | None) -> list[Block]:
    """Differences from the first run, a block for each metric of the answers, the primary one first."""
    first = None if primary is None else primary.name
    names = sorted(dict.fromkeys(one.metric.name for one in differences), key=lambda name: name != first)
    return [_block(runs, name, [one for one in differences if one.metric.name == name]) for name in names]


def _block(runs: Sequence[Told], metric: str, differences: Sequence[Difference]) -> Block:
    known = [(one, one.interval) for one in differences if one.interval is not None]
    others = [
        f"{_label(one.arm)}: {runs[one.run].letter} was judged on other prompts than {runs[0].letter}."
        for one in differences
        if one.interval is None
    ]
    if not known:
        return Block(title=text.name(metric), rows=[], axis=Markup(""), others=others)
    scale = scale_of([interval for _, interval in known], within=None, include=0.0)
    rows = []
    for one, interval in known:
        rows.append(
            PlotRow(
                arm=_label(one.arm),
                told=runs[one.run],
                svg=whisker(interval, scale, tone=f"s{one.run}", rule=0.0),
                value=text.signed(interval.mean),
                bounds=_bounds(interval),
                verdict="real" if one.real else "not shown",
                tone=run_tables.TONES[one.metric.verdict(interval)],
            )
        )
    return Block(title=text.name(metric), rows=rows, axis=scale_axis(scale), others=others)


# ---- curves and cost ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCurves:
    """A stage's charts with a line for each run that has it; ``notes`` say which have none, or lines that are one."""

    name: str
    kind: str
    charts: list[Chart]
    notes: list[str]


def _curves(runs: Sequence[Told]) -> list[StageCurves]:
    """Stages of one name and kind together. A result that several runs share is drawn once, as the first one's."""
    groups: dict[tuple[str, str], list[tuple[Told, Stage]]] = {}
    for one in runs:
        for stage in one.run.stages:
            groups.setdefault((stage.name, stage.kind), []).append((one, stage))
    found = [_stage_curves(name, kind, stages) for (name, kind), stages in groups.items()]
    return [one for one in found if one.charts or one.notes]


def _stage_curves(name: str, kind: str, stages: Sequence[tuple[Told, Stage]]) -> StageCurves:
    notes: list[str] = []
    drawn: dict[str, tuple[str, int, Stage]] = {}
    for one, stage in stages:
        if not stage.metrics:
            if stage.manifest is None and trains(kind):
                notes.append(f"{one.letter} has no curves of it yet ({stage.state}).")
        elif stage.artifact in drawn:
            notes.append(f"{one.letter} has the same result as {drawn[stage.artifact][0]}, drawn once.")
        else:
            drawn[stage.artifact] = (one.letter, one.look, stage)
    charts = overlaid(list(drawn.values())) if drawn else []
    return StageCurves(name=name, kind=kind, charts=charts, notes=notes)


def _costs(runs: Sequence[Told]) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """For each stage, each run's (time, peak memory, whether it was reused)."""
    told = [{row.name: row for row in run_tables.usage_rows(one.run)} for one in runs]
    names = dict.fromkeys(name for rows in told for name in rows)
    return [
        (
            name,
            [
                (rows[name].seconds, rows[name].memory, rows[name].state == "reused")
                if name in rows
                else ("–", "–", False)
                for rows in told
            ],
        )
        for name in names
    ]
