"""Assembles the page about a sweep and writes it: the trials, their results, and the best one to paste."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from alignment.records.interval import Interval
from alignment.records.sweep_record import FEWEST_FOR_IMPORTANCE, Goal, Setting, SweepRecord
from alignment.report.kit import text
from alignment.report.kit.pages import template, write_page
from alignment.report.kit.plots import interval_scatter
from alignment.report.sweep_page.parallel import parallel
from alignment.report.sweep_page.sweep_axes import of_parameter, short


def build_sweep(record: SweepRecord, output: Path) -> None:
    """Writes the page to the file ``output``; the same record gives the same bytes."""
    write_page(sweep_page(record), output)


def sweep_page(record: SweepRecord) -> str:
    """The page as HTML."""
    return template("sweep.html.j2", short=short, setting=_setting).render(
        sweep=record,
        facts=_facts(record),
        lead=_lead(record),
        shared=[_shared(goal) for goal in record.goals if goal.shared_arms],
        best=[trial for trial in record.trials if trial.number in record.best],
        paste=lambda trial: shlex.join(trial.words),
        command=lambda trial: shlex.join(["align", "run", record.recipe, *record.overrides, *trial.words]),
        parallel=parallel(record),
        slices=_slices(record),
        importance=_importance(record),
        unfinished=len(record.trials) < record.number,
        importance_to_come=len(record.parameters) > 1 and record.number >= FEWEST_FOR_IMPORTANCE,
        fewest=FEWEST_FOR_IMPORTANCE,
    )


def _facts(record: SweepRecord) -> list[tuple[str, str]]:
    counts = {state: sum(trial.state == state for trial in record.trials) for state in ("done", "failed", "pruned")}
    counts_text = ", ".join(f"{number} {state}" for state, number in counts.items() if number or state == "done")
    pairs = [
        ("recipe", record.recipe),
        ("with", shlex.join(record.overrides)),
        ("search", record.search),
        ("trials", f"{counts_text} of {record.number}"),
        (
            "judged by",
            text.listing(
                [f"{goal.label}, the {'less' if goal.minimize else 'more'} the better" for goal in record.goals]
            ),
        ),
    ]
    return [(heading, text.name(value, limit=300)) for heading, value in pairs if value]


def _lead(record: SweepRecord) -> str:
    if not record.best:
        return "No trial has ended yet." if not record.trials else "No trial ended with a result."
    so_far = "" if len(record.trials) >= record.number else " so far"
    if len(record.goals) > 1:
        return f"{len(record.best)} of {len(record.done)} trials{so_far} are not beaten by another in every metric."
    no_gain = f"{record.no_gain[0].upper()}{record.no_gain[1:]}. " if record.no_gain else ""
    best, label = record.trials[0], record.goals[0].label
    if record.is_tied:
        tied = text.listing([str(number) for number in sorted(record.best)])
        return (
            f"{no_gain}Trials {tied} tie{so_far}, so none of them is the best: {label} is {best.figures[0].mean:.3f}."
        )
    return f"{no_gain}Best {label}{so_far}: {_with_bounds(best.figures[0])}, in trial {best.number}."


def _shared(goal: Goal) -> str:
    """The arms that all trials share, which did not need the sweep."""
    arms = [f"{text.path_end(label, limit=48)} {_with_bounds(value)}" for label, value in goal.shared_arms.items()]
    return f"The same in all trials, to compare with {goal.label}: {text.listing(arms)}."


def _with_bounds(figure: Interval) -> str:
    bounds = "" if figure.low is None else f" ({text.number(figure.low, 3)} to {text.number(figure.high, 3)})"
    return f"{text.number(figure.mean, 3)}{bounds}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """A plot of one metric over one setting; ``dotted`` says what the dotted line is, if there is one."""

    title: str
    goal: str
    svg: Markup
    dotted: str


def _slices(record: SweepRecord) -> list[Slice]:
    """Every metric over every setting; empty until two trials are done."""
    done = record.done
    if len(done) < 2:
        return []
    marked = {index for index, trial in enumerate(done) if trial.number in record.best}
    slices = []
    for index, goal in enumerate(record.goals):
        dotted, guide = _guide(goal, [trial.figures[index] for trial in done])
        for parameter in record.parameters:
            axis = of_parameter(parameter)
            points = [(axis.position(trial.settings[parameter.key]), trial.figures[index]) for trial in done]
            title = f"{goal.label} over {axis.title}"
            svg = interval_scatter(points, axis.ticks, title=title, marked=marked, guide=guide)
            slices.append(Slice(title=axis.title, goal=goal.label, svg=svg, dotted=dotted))
    return slices


def _guide(goal: Goal, figures: list[Interval]) -> tuple[str, float | None]:
    """The best of the shared arms, with its label and value; without one, chance, if its value is known.

    An arm far from the trials' ``figures`` is left out: they would have less than half of the plot.
    """
    ends = [end for figure in figures for end in (figure.mean, figure.low, figure.high) if end is not None]
    reach = max(ends) - min(ends)
    ranked = sorted(goal.shared_arms.items(), key=lambda arm: arm[1].mean, reverse=not goal.minimize)
    for label, value in ranked[:1]:
        if min(ends) - reach <= value.mean <= max(ends) + reach:
            return f"{text.path_end(label, limit=48)} {text.number(value.mean, 3)}", value.mean
    return ("", None) if goal.chance is None else (f"chance {goal.chance:g}", goal.chance)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """How much of a metric depends on a setting: ``share`` as a length and in words."""

    title: str
    share: str
    words: str


def _importance(record: SweepRecord) -> list[tuple[str, list[Weight]]]:
    """For each goal the settings, most important first."""
    return [
        (
            goal.label,
            [
                Weight(title=short(key), share=f"{100 * share:.2f}%", words=text.share(share))
                for key, share in sorted(shares.items(), key=lambda pair: -pair[1])
            ],
        )
        for goal, shares in zip(record.goals, record.importance, strict=False)
    ]


def _setting(value: Setting) -> str:
    return f"{value:.4g}" if isinstance(value, float) else text.name(value, limit=40)
