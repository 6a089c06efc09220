"""Runs side by side in one HTML file: differing settings, arms, overlaid curves, answers, cost. Runs have letters; the
others are compared with run A. The page states what a run lacks."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from alignment.records.evaluation import NO_DIFFERENCE, TOO_FEW, ArmResult, Metric, Sample, SampleAnswer
from alignment.records.interval import Interval
from alignment.report.kit import text
from alignment.report.kit.pages import template, write_page
from alignment.report.kit.plots import scale_axis, scale_of, swatch, whisker
from alignment.report.run_page import run_tables
from alignment.report.run_page.curves import overlaid
from alignment.report.run_page.render import NUM_OPEN_SAMPLES
from alignment.report.run_page.run_files import read_run, side_by_side
from alignment.report.run_page.run_records import Difference, Run, Stage
from alignment.report.run_page.run_tables import Row, whisker_plot
from alignment.report.run_page.shown_rows import choose, gap
from alignment.report.run_page.verdict import judge
from alignment.stages.base import ResultTable
from alignment.stages.registry import trains

WIDEST = "runs differ most"
MOST_RUNS = 8
"""As many as have their own look (``.runs`` in style.css)."""
NUM_SAMPLES = 12


def rule(primary: str | None) -> str:
    """A description of how the shown prompts were chosen, if runs are compared by this metric."""
    by_hash = "ordered by a hash of their id and taken from each task in turn."
    others = "Arms that only one run has are left out; runs with the same answer are named together."
    if primary is None:
        return f"They are {by_hash} {others}"
    return (
        f"About half are the prompts on which one arm’s score by {primary} differs most between runs, taken from each "
        f"task in turn. The rest are {by_hash} {others}"
    )


class Shared(NamedTuple):
    """A prompt that several runs answered; ``arms`` are (arm, answers), an answer with the indices of its ``runs``."""

    sample: Sample
    why: str
    arms: list[tuple[str, list[Row]]]


def share(runs: Sequence[Run], num_samples: int, primary: str | None) -> Row:
    """The prompts to show (``shown``), and the ``count`` of those that at least two runs answered by an arm of the same
    name."""
    samples_by_prompt: dict[str, dict[int, Sample]] = {}
    for run_index, run in enumerate(runs):
        for sample in run.samples:
            samples_by_prompt.setdefault(sample.prompt, {}).setdefault(run_index, sample)
    widest: list[Sample] = []  # each with the answers of the one arm in which the runs differ most
    arms_of: dict[int, dict[str, dict[int, SampleAnswer]]] = {}
    for by_run in samples_by_prompt.values():
        if arms := _arms_of(by_run):
            sample = next(iter(by_run.values()))
            of_arms = [replace(sample, answers={str(run): a for run, a in by_run.items()}) for by_run in arms.values()]
            widest.append(max(of_arms, key=lambda of_arm: gap(of_arm, primary)))
            arms_of[id(widest[-1])] = arms
    shown = [
        Shared(sample, why, [(arm, _different(by_run)) for arm, by_run in arms_of[id(sample)].items()])
        for sample, why in choose(widest, num_samples, primary=primary, widest=WIDEST)
    ]
    return {"shown": shown, "count": len(widest)}


def _arms_of(by_run: dict[int, Sample]) -> dict[str, dict[int, SampleAnswer]]:
    arms: dict[str, dict[int, SampleAnswer]] = {}
    for run_index, sample in by_run.items():
        for arm, answer in sample.answers.items():
            arms.setdefault(arm, {})[run_index] = answer
    return {arm: answers for arm, answers in arms.items() if len(answers) > 1}


def _different(by_run: dict[int, SampleAnswer]) -> list[Row]:
    """Each answer once; the same text with other scores, as after a change of a metric, is another one."""
    different: dict[tuple[object, ...], Row] = {}
    for run_index, answer in by_run.items():
        key = (answer.text, *(turn.text for turn in answer.turns), *sorted(answer.scores.items()))
        different.setdefault(key, {"runs": [], "answer": answer})["runs"].append(run_index)
    return list(different.values())


def build_comparison(
    folders: Sequence[Path],
    output: Path,
    *,
    settings: Mapping[str, Sequence[str]],
    differences: Sequence[Difference],
    primary: Metric | None,
) -> None:
    """Writes the page about the runs in ``folders`` (at most ``MOST_RUNS``) to the file ``output``. ``settings`` are
    those that differ, with a value for each run; ``differences`` are relative to the first run. ``primary`` is the
    metric by which runs are compared, if there is any. Raises ArtifactError: a run.json is missing or unreadable."""
    runs = [
        ListedRun(look=look, letter=letter, run=read_run(folder))
        for look, (letter, folder) in enumerate(zip(string.ascii_uppercase, folders, strict=False))
    ]
    write_page(page(runs, settings=settings, differences=differences, primary=primary), output)


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedRun:
    """A run with its letter and look on the page."""

    look: int
    letter: str
    run: Run

    @property
    def swatch(self) -> Markup:
        return swatch(self.look)

    @property
    def facts(self) -> dict[str, str]:
        return dict(run_tables.facts(self.run))

    @property
    def notes(self) -> list[str]:
        return ([] if self.run.evaluation else [self.run.evaluation_note]) + judge(self.run).warnings


def page(
    runs: Sequence[ListedRun],
    *,
    settings: Mapping[str, Sequence[str]],
    differences: Sequence[Difference],
    primary: Metric | None,
) -> str:
    name = None if primary is None else primary.name
    shared = share([listed.run for listed in runs], NUM_SAMPLES, name)
    by_primary = [item for item in differences if item.metric.name == name]
    return template("comparison.html.j2").render(
        runs=runs,
        settings=[
            (text.name(key, limit=120), [text.prose(value) for value in values]) for key, values in settings.items()
        ],
        lead=_lead(runs, by_primary, primary),
        sentences=[_sentence(runs, difference) for difference in by_primary],
        arms=_arms(runs),
        plots=None if name is None else _primary_plots(runs, name),
        blocks=_blocks(runs, differences, primary),
        results=_results(runs),
        curves=_curves(runs),
        shared=shared,
        rule=rule(name),
        num_open=NUM_OPEN_SAMPLES,
        costs=_costs(runs),
    )


def _lead(runs: Sequence[ListedRun], differences: Sequence[Difference], primary: Metric | None) -> str:
    """``differences`` are those in the primary metric."""
    if not any(listed.run.evaluation for listed in runs):
        return "None of these runs was evaluated, so it is unknown which is better."
    if primary is None:
        return "No evaluation of these runs has a metric, so it is unknown which is better."
    if not differences:
        return (
            f"No arm was scored by {primary.name} both in {runs[0].letter} and in another run, in evaluations that the "
            "reports show, so none can be compared."
        )
    paired = [difference for difference in differences if difference.interval is not None]
    if not paired:
        return f"The other runs were evaluated on different prompts than {runs[0].letter}, so differences are unknown."
    real = [difference for difference in paired if difference.real]
    few = [difference for difference in paired if difference.verdict == TOO_FEW]
    if few == paired:
        return f"The runs share {TOO_FEW}, too few to say which is better."
    if not real:
        return f"No difference from {runs[0].letter} is shown to be more than chance."
    verb = "is" if len(real) == 1 else "are"
    return f"{len(real)} of {len(paired)} differences from {runs[0].letter} in {primary.name} {verb} real."


def _sentence(runs: Sequence[ListedRun], difference: Difference) -> str:
    label, letter, first = _label(difference.arm), runs[difference.run].letter, runs[0].letter
    measured = difference.interval
    if measured is None:
        return f"{label}: {letter} was evaluated on different prompts than {first}, so the two cannot be compared."
    metric = difference.metric.name
    bounds = f"95\u202f% interval {text.bounds(measured, 3, text.signed)}{difference.p_in_words}"
    interval = f"{text.signed(measured.mean)} in {metric} ({bounds}){difference.without}"
    if difference.none_at_all:
        return f"{label}: the same {metric} in {letter} and {first} on every prompt{difference.without}."
    if difference.verdict == TOO_FEW:
        return f"{label}: {TOO_FEW}, so no difference between {letter} and {first} can be shown: {interval}."
    if not difference.real:
        return f"{label}: no difference between {letter} and {first} is shown: {interval}."
    return f"{label}: {letter} is really {difference.verdict} than {first}: {interval}."


def _label(arm: str) -> str:
    return text.path_end(arm.removeprefix("stage:"), limit=48)


def _listed_arms(runs: Sequence[ListedRun]) -> list[tuple[ListedRun, ArmResult]]:
    """The arms in the evaluations; the runs of an arm follow each other."""
    every = [(listed, arm) for listed in runs if listed.run.evaluation for arm in listed.run.evaluation.arms]
    order = list(dict.fromkeys(arm.name for _, arm in every))
    return sorted(every, key=lambda pair: order.index(pair[1].name))


def _arms(runs: Sequence[ListedRun]) -> Row:
    """Every value of the arms, as ``headings`` and ``rows`` (arm, run, cells); a cell is (value, bounds)."""
    every = [(arm.label, listed, arm.all_metrics) for listed, arm in _listed_arms(runs)]
    headings = list(dict.fromkeys(heading for _, _, figures in every for heading in figures))
    rows = [
        (label, listed, [_arm_cell(figures.get(heading)) for heading in headings]) for label, listed, figures in every
    ]
    return {"headings": headings, "rows": rows}


def _arm_cell(item: Interval | None) -> tuple[str, str]:
    if item is None:
        return "–", ""
    digits = 1 if abs(item.mean) >= 10 else 2
    return text.number(item.mean, digits), text.bounds(item, digits)


def _primary_plots(runs: Sequence[ListedRun], metric: str) -> Row | None:
    known = [(listed, arm) for listed, arm in _listed_arms(runs) if metric in arm.metrics]
    if not known:
        return None
    plot = whisker_plot([(_label(arm.name), arm.metrics[metric], f"s{listed.look}") for listed, arm in known])
    rows = [row | {"arm": row["label"], "listed": listed} for row, (listed, _) in zip(plot["rows"], known, strict=True)]
    return plot | {"title": metric, "rows": rows}


def _blocks(runs: Sequence[ListedRun], differences: Sequence[Difference], primary: Metric | None) -> list[Row]:
    by_metric: dict[str, list[Difference]] = {} if primary is None else {primary.name: []}
    for difference in differences:
        by_metric.setdefault(difference.metric.name, []).append(difference)
    return [_block(runs, name, of_metric) for name, of_metric in by_metric.items() if of_metric]


def _block(runs: Sequence[ListedRun], metric: str, differences: Sequence[Difference]) -> Row:
    """``rows`` on one ``axis``; ``others`` are sentences about differences that cannot be drawn."""
    known = [(difference, difference.interval) for difference in differences if difference.interval is not None]
    others = [
        f"{_label(difference.arm)}: {runs[difference.run].letter} was evaluated on different prompts than "
        f"{runs[0].letter}."
        for difference in differences
        if difference.interval is None
    ]
    if not known:
        return {"title": text.name(metric), "rows": [], "others": others}
    scale = scale_of([interval for _, interval in known], within=None, include=0.0)
    rows = [
        {
            "arm": _label(difference.arm),
            "listed": runs[difference.run],
            "svg": whisker(interval, scale, tone=f"s{difference.run}", rule=0.0),
            "value": text.signed(interval.mean),
            "bounds": text.bounds(interval, 3, text.signed),
            "verdict": "real" if difference.real else difference.verdict,
            "tone": run_tables.TONES.get(difference.verdict, run_tables.TONES[NO_DIFFERENCE]),
        }
        for difference, interval in known
    ]
    return {"title": text.name(metric), "rows": rows, "axis": scale_axis(scale), "others": others}


def _results(runs: Sequence[ListedRun]) -> list[tuple[str, ResultTable, list[str]]]:
    """The tables that kinds of stage bring: the stage, a table with the arms of all runs, and its headings."""
    letters = [listed.letter for listed in runs]
    return [
        (stage, table, [f"{letters[int(key.partition('/')[0])]}: {heading}" for key, heading in table.columns.items()])
        for stage, table in side_by_side([listed.run.tables for listed in runs])
    ]


def _curves(runs: Sequence[ListedRun]) -> list[Row]:
    """Charts of stages of one name and kind, with a line for each run that has it; ``notes`` name runs without a line,
    or with the same one. A result that several runs share is drawn once, for the first run."""
    groups: dict[tuple[str, str], list[tuple[ListedRun, Stage]]] = {}
    for listed in runs:
        for stage in listed.run.stages:
            groups.setdefault((stage.name, stage.kind), []).append((listed, stage))
    curves = []
    for (name, kind), stages in groups.items():
        notes: list[str] = []
        drawn: dict[str, tuple[str, int, Stage]] = {}
        for listed, stage in stages:
            if not stage.metrics:
                if stage.manifest is None and trains(kind):
                    notes.append(f"{listed.letter} has no curves for this stage yet ({stage.state}).")
            elif stage.artifact in drawn:
                notes.append(f"{listed.letter} has the same result as {drawn[stage.artifact][0]}, drawn once.")
            else:
                drawn[stage.artifact] = (listed.letter, listed.look, stage)
        charts = overlaid(list(drawn.values())) if drawn else []
        if charts or notes:
            curves.append({"name": name, "kind": kind, "charts": charts, "notes": notes})
    return curves


def _costs(runs: Sequence[ListedRun]) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """For each stage, each run's (time, peak memory, whether it was reused)."""
    rows_by_run = [{row["name"]: row for row in run_tables.usage_rows(listed.run)} for listed in runs]
    absent = {"seconds": "–", "memory": "–", "state": ""}
    costs = []
    for name in dict.fromkeys(name for rows in rows_by_run for name in rows):
        of_runs = [rows.get(name, absent) for rows in rows_by_run]
        costs.append((name, [(row["seconds"], row["memory"], row["state"] == "reused") for row in of_runs]))
    return costs
