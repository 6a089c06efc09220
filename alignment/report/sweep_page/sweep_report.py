"""Assembles the page about a sweep and writes it: the trials, their results, and the best one to paste."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from alignment.records.interval import Interval
from alignment.records.sweep_record import FEWEST_FOR_IMPORTANCE, Goal, Parameter, Setting, SweepRecord, Trial
from alignment.report.kit import text
from alignment.report.kit.pages import template, write_page
from alignment.report.kit.plots import apart, interval_scatter, nice_ticks, padded, tick_labels
from alignment.report.run_page.run_tables import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """``position`` maps a value to a position from 0 (the lower end) to 1; ``ticks`` are positions with their
    labels."""

    title: str
    ticks: list[tuple[float, str]]
    position: Callable[[Setting], float]


def of_parameter(parameter: Parameter) -> Axis:
    """Listed values at equal distances in their order; a range on a linear scale, or on a logarithmic one if
    ``log``."""
    title = short(parameter.key)
    if parameter.values:
        last = len(parameter.values) - 1
        positions = {value: position / last if last else 0.5 for position, value in enumerate(parameter.values)}
        named = [(position, text.name(value, limit=12)) for value, position in positions.items()]
        return Axis(title=title, ticks=named, position=lambda value: positions[str(value)])
    low, high = parameter.low, parameter.high
    assert low is not None
    assert high is not None
    if not parameter.log:
        return _linear(title, low, high)
    ticks = log_ticks(low, high)
    return _axis(title, ticks, apart(ticks), lambda value: math.log(float(value) / low) / math.log(high / low))


def of_goal(label: str, trials: list[Trial], index: int) -> Axis:
    low, high = padded([trial.figures[index].mean for trial in trials])
    return _linear(text.name(label, limit=30), low, high)


def short(key: str) -> str:
    """``stages.dpo.beta`` → ``dpo.beta``."""
    return text.name(key.removeprefix("stages."), limit=30)


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high]; if there are fewer than two, also 2 and 5 times powers; else the ends."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for factors in ((1,), (1, 2, 5)):
        candidates = [factor * power for power in powers for factor in factors]
        inside = [tick for tick in candidates if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(inside) > 1:
            return inside
    return [low, high]


def _linear(title: str, low: float, high: float) -> Axis:
    ticks = nice_ticks(low, high, 5)
    return _axis(title, ticks, tick_labels(ticks), lambda value: (float(value) - low) / (high - low))


def _axis(title: str, ticks: list[float], labels: list[str], position: Callable[[Setting], float]) -> Axis:
    at_ticks = [(position(tick), label) for tick, label in zip(ticks, labels, strict=True)]
    return Axis(title=title, ticks=at_ticks, position=position)


WIDTH, HEIGHT = 940, 330
LEFT, RIGHT, TOP, BOTTOM = 60, 70, 52, 14
SHADES = 5
MOST_IN_A_ROW = 4


def parallel(record: SweepRecord) -> Markup:
    """A line for each trial over an axis for each setting and metric; empty until two trials are done."""
    done = record.done
    if len(done) < 2:
        return Markup("")
    axes = [of_parameter(parameter) for parameter in record.parameters]
    axes += [of_goal(goal.label, done, index) for index, goal in enumerate(record.goals)]
    lines = [_line(trial, axes, record) for trial in reversed(record.trials)]  # the best is drawn last
    spoken = f"{len(done)} trials, their settings and metrics; the table has the same numbers"
    drawing = '<svg class="parallel" viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}</svg>'
    return Markup(f'<div class="scroll">{drawing}</div>').format(
        WIDTH, HEIGHT, spoken, Markup("").join(lines), Markup("").join(_axis_at(axes, at) for at in range(len(axes)))
    )


def _point(at: int, position: float, number: int) -> tuple[float, float]:
    """The pixels of a position on the axis with the index ``at`` of ``number`` axes."""
    return LEFT + at * (WIDTH - LEFT - RIGHT) / max(1, number - 1), TOP + (1 - position) * (HEIGHT - TOP - BOTTOM)


def _axis_at(axes: list[Axis], at: int) -> Markup:
    """The axis with its numbers; with many axes every other title is higher, so that titles do not overlap."""
    x, _ = _point(at, 0.0, len(axes))
    anchor = "start" if at == 0 else "end" if at == len(axes) - 1 else "middle"
    shift = {"start": -LEFT + 2, "end": RIGHT - 2, "middle": 0}[anchor]
    height = TOP - 14 - (18 * (at % 2) if len(axes) > MOST_IN_A_ROW else 0)
    parts = [
        Markup('<path class="axis" d="M{:.1f} {}V{}"/>').format(x, TOP, HEIGHT - BOTTOM),
        _text("head", x + shift, height, anchor, axes[at].title),
    ]
    for position, label in axes[at].ticks:
        _, y = _point(at, position, len(axes))
        parts.append(Markup('<path class="axis" d="M{:.1f} {:.1f}h5"/>').format(x, y))
        parts.append(_text("tick", x + 8, y + 3.5, "start", label))
    return Markup("").join(parts)


def _text(kind: str, x: float, y: float, anchor: str, words: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, words)


def _line(trial: Trial, axes: list[Axis], record: SweepRecord) -> Markup:
    values = [trial.settings[parameter.key] for parameter in record.parameters] + [item.mean for item in trial.figures]
    pixels = (_point(at, axes[at].position(value), len(axes)) for at, value in enumerate(values))
    points = [f"{x:.1f} {y:.1f}" for x, y in pixels]
    values_text = ", ".join(text.number(item.mean, 3) for item in trial.figures) or trial.state
    return Markup('<path class="trial {}" d="M{}"><title>{}</title></path>').format(
        _kind(trial, record), "L".join(points), f"trial {trial.number}: {values_text}; {' '.join(trial.words)}"
    )


def _kind(trial: Trial, record: SweepRecord) -> str:
    """``best``, ``failed``, ``pruned``, or a shade from 1 to 5, stronger for better trials."""
    if trial.state != "done":
        return trial.state
    if trial.number in record.best:
        return "best"
    better = sorted((finished.figures[0].mean for finished in record.done), reverse=not record.goals[0].minimize)
    return f"shade{SHADES - better.index(trial.figures[0].mean) * SHADES // len(better)}"


def build_sweep(record: SweepRecord, output: Path) -> None:
    """Writes the page to the file ``output``; the same record gives the same bytes."""
    write_page(sweep_page(record), output)


def sweep_page(record: SweepRecord) -> str:
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
    goals = [f"{goal.label}, the {'less' if goal.minimize else 'more'} the better" for goal in record.goals]
    pairs = [
        ("recipe", record.recipe),
        ("with", shlex.join(record.overrides)),
        ("search", record.search),
        ("trials", f"{counts_text} of {record.number}"),
        ("judged by", text.listing(goals)),
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
    arms = [f"{text.path_end(label, limit=48)} {_with_bounds(value)}" for label, value in goal.shared_arms.items()]
    return f"The same in all trials, to compare with {goal.label}: {text.listing(arms)}."


def _with_bounds(figure: Interval) -> str:
    bounds = text.bounds(figure, 3)
    return text.number(figure.mean, 3) + (f" ({bounds})" if bounds else "")


def _slices(record: SweepRecord) -> list[Row]:
    """A plot of every metric over every setting, and what its dotted line is, if it has one; empty until two trials are
    done."""
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
            slices.append({"title": axis.title, "goal": goal.label, "svg": svg, "dotted": dotted})
    return slices


def _guide(goal: Goal, figures: list[Interval]) -> tuple[str, float | None]:
    """The best of the shared arms, with its label and value; without one, chance, if its value is known. An arm far
    from the trials' ``figures`` is left out: they would have less than half of the plot."""
    ends = [end for figure in figures for end in (figure.mean, figure.low, figure.high) if end is not None]
    reach = max(ends) - min(ends)
    ranked = sorted(goal.shared_arms.items(), key=lambda arm: arm[1].mean, reverse=not goal.minimize)
    for label, value in ranked[:1]:
        if min(ends) - reach <= value.mean <= max(ends) + reach:
            return f"{text.path_end(label, limit=48)} {text.number(value.mean, 3)}", value.mean
    return ("", None) if goal.chance is None else (f"chance {goal.chance:g}", goal.chance)


def _importance(record: SweepRecord) -> list[tuple[str, list[Row]]]:
    """For each goal the settings, most important first, each with its share as a length and in words."""
    return [
        (
            goal.label,
            [
                {"title": short(key), "share": f"{100 * share:.2f}%", "words": text.share(share)}
                for key, share in sorted(shares.items(), key=lambda pair: -pair[1])
            ],
        )
        for goal, shares in zip(record.goals, record.importance, strict=False)
    ]


def _setting(value: Setting) -> str:
    return f"{value:.4g}" if isinstance(value, float) else text.name(value, limit=40)
