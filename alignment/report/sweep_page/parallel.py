"""Parallel coordinates as inline SVG: an axis for each setting and each metric, a line for each trial.

Colours are classes; every text from outside passes ``Markup.format``, which escapes it.
"""

from __future__ import annotations

from collections.abc import Callable

from markupsafe import Markup

from alignment.records.sweep_record import SweepRecord, Trial
from alignment.report.kit import text
from alignment.report.sweep_page.sweep_axes import Axis, of_goal, of_parameter

WIDTH, HEIGHT = 940, 330
LEFT, RIGHT, TOP, BOTTOM = 60, 70, 52, 14
SHADES = 5
MOST_IN_A_ROW = 4
NARROW, ROW, MARGIN = 360, 66, 8
"""The drawing with horizontal axes: its width, the height for each axis, and the margin on the left and right."""
DIGIT = 6.5
"""Approximate width of a character of a tick, in pixels."""


def parallel(record: SweepRecord) -> Markup:
    """The drawing twice, with vertical axes and with horizontal axes for a narrow screen; the style sheet shows the one
    that fits. It is empty until two trials are done."""
    done = record.done
    if len(done) < 2:
        return Markup("")
    axes = [of_parameter(parameter) for parameter in record.parameters]
    axes += [of_goal(goal.label, done, index) for index, goal in enumerate(record.goals)]
    upright = _drawing(record, axes, "upright", (WIDTH, HEIGHT), _upright_point, _upright_axis)
    lying = _drawing(record, axes, "lying", (NARROW, ROW * len(axes)), _lying_point, _lying_axis)
    return upright + lying


Point = Callable[[int, float, int], tuple[float, float]]
"""Maps the index of an axis, a position on it and the number of axes to pixels."""


def _drawing(
    record: SweepRecord,
    axes: list[Axis],
    kind: str,
    size: tuple[int, int],
    point: Point,
    axis: Callable[[list[Axis], int], Markup],
) -> Markup:
    lines = [_line(trial, axes, record, point) for trial in reversed(record.trials)]  # the best is drawn last
    spoken = f"{len(record.done)} trials, their settings and metrics; the table has the same numbers"
    return Markup('<svg class="parallel {}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}</svg>').format(
        kind, *size, spoken, Markup("").join(lines), Markup("").join(axis(axes, at) for at in range(len(axes)))
    )


def _upright_point(at: int, position: float, number: int) -> tuple[float, float]:
    return LEFT + at * (WIDTH - LEFT - RIGHT) / max(1, number - 1), TOP + (1 - position) * (HEIGHT - TOP - BOTTOM)


def _upright_axis(axes: list[Axis], at: int) -> Markup:
    """The axis with its numbers; with many axes every other title is higher, so that titles do not overlap."""
    x, _ = _upright_point(at, 0.0, len(axes))
    anchor = "start" if at == 0 else "end" if at == len(axes) - 1 else "middle"
    shift = {"start": -LEFT + 2, "end": RIGHT - 2, "middle": 0}[anchor]
    height = TOP - 14 - (18 * (at % 2) if len(axes) > MOST_IN_A_ROW else 0)
    parts = [
        Markup('<path class="axis" d="M{:.1f} {}V{}"/>').format(x, TOP, HEIGHT - BOTTOM),
        _text("head", x + shift, height, anchor, axes[at].title),
    ]
    for position, label in axes[at].ticks:
        _, y = _upright_point(at, position, len(axes))
        parts.append(Markup('<path class="axis" d="M{:.1f} {:.1f}h5"/>').format(x, y))
        parts.append(_text("tick", x + 8, y + 3.5, "start", label))
    return Markup("").join(parts)


def _lying_point(at: int, position: float, _: int) -> tuple[float, float]:
    return MARGIN + position * (NARROW - 2 * MARGIN), ROW * at + ROW / 2


def _lying_axis(axes: list[Axis], at: int) -> Markup:
    """The axis under its title, with the numbers that do not overlap below it."""
    _, y = _lying_point(at, 0.0, len(axes))
    parts = [
        Markup('<path class="axis" d="M{} {:.1f}H{}"/>').format(MARGIN, y, NARROW - MARGIN),
        _text("head", MARGIN, y - 14, "start", axes[at].title),
    ]
    free = 0.0
    for position, label in sorted(axes[at].ticks):
        x, _ = _lying_point(at, position, len(axes))
        parts.append(Markup('<path class="axis" d="M{:.1f} {:.1f}v4"/>').format(x, y))
        half = len(label) * DIGIT / 2
        middle = min(max(x, half), NARROW - half)
        if middle - half >= free:
            parts.append(_text("tick", middle, y + 16, "middle", label))
            free = middle + half + DIGIT
    return Markup("").join(parts)


def _text(kind: str, x: float, y: float, anchor: str, words: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, words)


def _line(trial: Trial, axes: list[Axis], record: SweepRecord, point: Point) -> Markup:
    """A line through the trial's settings and, if it has them, its metrics."""
    values = [trial.settings[parameter.key] for parameter in record.parameters] + [item.mean for item in trial.figures]
    pixels = (point(at, axes[at].position(value), len(axes)) for at, value in enumerate(values))
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
