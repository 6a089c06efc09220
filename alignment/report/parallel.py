"""Parallel coordinates: an upright axis for each setting and each figure, a line for each trial, as inline SVG.

Colours are classes; every text from outside passes ``Markup.format``, which escapes it.
"""

from __future__ import annotations

from markupsafe import Markup

from alignment.report import text
from alignment.report.sweep_axes import Axis, of_goal, of_parameter
from alignment.report.sweep_records import SweepRecord, Trial

WIDTH, HEIGHT = 940, 330
LEFT, RIGHT, TOP, BOTTOM = 60, 70, 52, 14
SHADES = 5
MOST_IN_A_ROW = 4


def parallel(record: SweepRecord) -> Markup:
    """The drawing, or nothing before two trials are done."""
    done = record.done
    if len(done) < 2:
        return Markup("")
    axes = [of_parameter(one) for one in record.parameters]
    axes += [of_goal(goal.label, done, index) for index, goal in enumerate(record.goals)]
    lines = [_line(trial, axes, record) for trial in reversed(record.trials)]  # the best on top
    spoken = f"{len(done)} trials, their settings and figures; the table has the same numbers"
    return Markup('<svg class="parallel" viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}</svg>').format(
        WIDTH, HEIGHT, spoken, Markup("").join(lines), Markup("").join(_axis(axes, at) for at in range(len(axes)))
    )


def _x(at: int, number: int) -> float:
    return LEFT + at * (WIDTH - LEFT - RIGHT) / max(1, number - 1)


def _y(place: float) -> float:
    return TOP + (1 - place) * (HEIGHT - TOP - BOTTOM)


def _axis(axes: list[Axis], at: int) -> Markup:
    """The axis with its numbers; where there are many, every other title stands higher, so that they do not meet."""
    x = _x(at, len(axes))
    anchor = "start" if at == 0 else "end" if at == len(axes) - 1 else "middle"
    shift = {"start": -LEFT + 2, "end": RIGHT - 2, "middle": 0}[anchor]
    parts = [
        Markup('<path class="axis" d="M{:.1f} {}V{}"/>').format(x, TOP, HEIGHT - BOTTOM),
        Markup('<text class="head" x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(
            x + shift, TOP - 14 - (18 * (at % 2) if len(axes) > MOST_IN_A_ROW else 0), anchor, axes[at].title
        ),
    ]
    for place, label in axes[at].ticks:
        parts.append(
            Markup(
                '<path class="axis" d="M{:.1f} {:.1f}h5"/><text class="tick" x="{:.1f}" y="{:.1f}">{}</text>'
            ).format(x, _y(place), x + 8, _y(place) + 3.5, label)
        )
    return Markup("").join(parts)


def _line(trial: Trial, axes: list[Axis], record: SweepRecord) -> Markup:
    """Through the trial's settings, and on through its figures where it has any."""
    values = [trial.settings[one.key] for one in record.parameters] + [item.mean for item in trial.figures]
    points = [f"{_x(at, len(axes)):.1f} {_y(axes[at].place(value)):.1f}" for at, value in enumerate(values)]
    figures = ", ".join(text.number(item.mean, 3) for item in trial.figures) or trial.state
    return Markup('<path class="trial {}" d="M{}"><title>{}</title></path>').format(
        _kind(trial, record), "L".join(points), f"trial {trial.number}: {figures}; {' '.join(trial.words)}"
    )


def _kind(trial: Trial, record: SweepRecord) -> str:
    """``best``, ``failed``, ``pruned``, or a shade from 1 to 5, the better the stronger."""
    if trial.state != "done":
        return trial.state
    if trial.number in record.best:
        return "best"
    better = sorted((one.figures[0].mean for one in record.done), reverse=not record.goals[0].minimize)
    return f"shade{SHADES - better.index(trial.figures[0].mean) * SHADES // len(better)}"
