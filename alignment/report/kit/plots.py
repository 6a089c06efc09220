"""Learning curves and interval plots as inline SVG. Colours are CSS classes, so that the style sheet can set the theme.
Every text from outside passes ``Markup.format``, which escapes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean

from markupsafe import Markup

from alignment.records.interval import Interval
from alignment.report.kit import text

_ROUNDING = 1e-5
"""Share of a value below which a change is rounding of float32; ticks would differ only in their last digits."""

Points = list[tuple[float, float | None]]
"""(step, value) in order; None is a value that was not finite, drawn as a gap."""


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers inside [low, high], at least one."""
    span = high - low
    if span <= 0:
        return [low]
    step = nice_step(span / max(1, count))
    first = math.ceil(low / step - 1e-9)
    ticks = [index * step for index in range(first, first + 4 * count) if index * step <= high + step * 1e-9]
    return [0.0 if abs(tick) < step * 1e-9 else tick for tick in ticks] or [low]


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5 or 5 times a power of ten that is not below ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= rough * (1 - 1e-9)), 10 * power)


def tick_labels(ticks: list[float]) -> list[str]:
    """The ticks in one format, with as few decimals as distinguish them."""
    size = max(abs(tick) for tick in ticks)
    step = min((b - a for a, b in pairwise(ticks)), default=size or 1.0)
    if size >= 1e4 or (size and step < 1e-4):
        labels = [text.compact(tick) for tick in ticks]
        return labels if len(set(labels)) == len(ticks) else apart(ticks)
    decimals = next((d for d in range(6) if abs(round(step, d) - step) < step * 1e-6), 5)
    return [text.number(tick, decimals) for tick in ticks]


def apart(ticks: list[float]) -> list[str]:
    """The ticks with as few significant digits, but at least three, as distinguish them."""
    for digits in range(3, 17):
        labels = [f"{tick:.{digits}g}".replace("-", text.MINUS, int(tick < 0)) for tick in ticks]
        if len(set(labels)) == len(set(ticks)):
            break
    return labels


def padded(values: list[float], share: float = 0.06) -> tuple[float, float]:
    """The range of the values with a margin, also around a value that is constant except for rounding."""
    low, high = min(values), max(values)
    if high - low <= _ROUNDING * max(abs(low), abs(high)):
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    margin = (high - low) * share
    return low - margin, high + margin


def segments(points: Points) -> list[list[tuple[float, float]]]:
    """The parts of a series between its gaps."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is not None:
            stretches[-1].append((x, y))
        elif stretches[-1]:
            stretches.append([])
    return [segment for segment in stretches if segment]


def thinned(points: Points, most: int) -> Points:
    """About ``most`` points at most: the lowest and the highest of each bucket, so that no spike is lost, and a gap."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most / 3))
    thin: Points = []
    for start in range(0, len(points), size):
        bucket = list(enumerate(points[start : start + size]))
        known = [(y, index) for index, (_, y) in bucket if y is not None]
        chosen = {min(known)[1], max(known)[1]} if known else set()
        chosen.update([index for index, (_, y) in bucket if y is None][:1])
        thin += [points[start + index] for index in sorted(chosen)]
    return thin


def smoothed(points: Points) -> Points:
    """The mean of a window around each point, about a fifteenth of the series wide, so that it does not lag. The window
    is cut at the ends of the series; gaps stay gaps."""
    half = max(2, len(points) // 30)
    sums, counts = [0.0], [0]
    for _, y in points:
        sums.append(sums[-1] + (y or 0.0))
        counts.append(counts[-1] + (y is not None))
    result: Points = []
    for index, (x, y) in enumerate(points):
        first, last = max(0, index - half), min(len(points), index + half + 1)
        result.append((x, None if y is None else (sums[last] - sums[first]) / (counts[last] - counts[first])))
    return result


WIDTH, HEIGHT = 340, 176
LEFT, RIGHT, TOP, BOTTOM = 46, 64, 10, 24
MAX_POINTS = 420
MIN_TO_SMOOTH = 24
MIN_TICK_GAP = 34
"""Minimum pixels between the middles of two numbers under a plot."""
MIN_LINE_GAP = 10
"""Minimum pixels between two numbers beside a plot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A series of a chart. ``label`` is drawn below its last value, and is empty if a chart has one line; ``tag``, a
    letter or two, is drawn before the value. ``look`` is the number of its colour, dashes and mark; None is its index
    in the chart."""

    points: Points
    label: str = ""
    tag: str = ""
    look: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """Maps data to the pixels of a curve plot."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float

    def x(self, value: float) -> float:
        """Pixels from the left edge."""
        return LEFT + (value - self.low_x) / (self.high_x - self.low_x) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the top edge."""
        return TOP + (self.high_y - value) / (self.high_y - self.low_y) * (HEIGHT - TOP - BOTTOM)


def curve(lines: list[Line], *, title: str, guide: float | None, over_steps: bool = True) -> Markup:
    """One small chart: thin raw lines, smoothed lines over them, and last values labelled at the right. ``guide`` is a
    value worth comparing with (chance, ln 2), drawn dotted. Every line needs a finite point. An axis of steps has whole
    numbers."""
    lines = [replace(line, look=index) if line.look is None else line for index, line in enumerate(lines)]
    values = [y for line in lines for _, y in line.points if y is not None]
    steps = [x for line in lines for x, y in line.points if y is not None]
    low_x, high_x = min(steps), max(steps)
    if high_x <= low_x:
        low_x, high_x = low_x - 1, high_x + 1
    low_y, high_y = padded(values if guide is None else [*values, guide])
    frame = Frame(low_x=low_x, high_x=high_x, low_y=low_y, high_y=high_y)
    parts = [_y_axis(frame), _x_axis(frame, max(steps), whole=over_steps), _guide(frame, guide)]
    parts += [_series(line.points, frame, line.look) for line in lines]
    parts.append(_end_labels(lines, frame))
    return _drawing(_spoken(title, lines), parts)


def interval_curve(points: list[tuple[float, Interval]], *, title: str, guide: float | None) -> Markup:
    """Dots on their intervals over a logarithmic axis labelled with the points' values; a line joins the means.
    ``points`` are in order of x, which is above 0. ``guide`` is drawn dotted."""
    scale = scale_of([item for _, item in points], within=(0.0, 1.0), include=guide)
    xs = sorted({x for x, _ in points})
    low_x, high_x = padded([math.log10(x) for x in xs])
    frame = Frame(low_x=low_x, high_x=high_x, low_y=scale.low, high_y=scale.high)
    pixels = {x_value: frame.x(math.log10(x_value)) for x_value in xs}
    drawn = [_y_axis(frame), _axis_of_values(pixels), _guide(frame, guide)]
    means = [fmean(item.mean for x, item in points if x == x_value) for x_value in xs]
    joined = _path([(math.log10(x_value), mean) for x_value, mean in zip(xs, means, strict=True)], frame)
    drawn += _joined([(pixels[x], item) for x, item in points], joined, frame)
    last = means[-1]
    drawn.append(_label(WIDTH - RIGHT + 7, frame.y(last) + 4, text.compact(last), "end s0"))
    spoken = ", ".join(f"{text.number(item.mean)} at {text.number(x, 0)}" for x, item in points)
    return _drawing(f"{title}: {spoken}", drawn)


def interval_scatter(
    points: list[tuple[float, Interval]],
    ticks: list[tuple[float, str]],
    *,
    title: str,
    marked: set[int],
    guide: float | None = None,
) -> Markup:
    """Dots on their intervals at positions from 0 to 1 along an axis with ``ticks``. Points with an index in ``marked``
    have another colour. ``guide`` is drawn dotted."""
    scale = scale_of([item for _, item in points], within=None, include=guide)
    frame = Frame(low_x=-0.06, high_x=1.06, low_y=scale.low, high_y=scale.high)
    parts = [_y_axis(frame), _axis_below([frame.x(position) for position, _ in ticks], [label for _, label in ticks])]
    parts.append(_guide(frame, guide))
    for index, (position, item) in enumerate(points):
        colour = 1 if index in marked else 0
        parts.append(_upright(frame.x(position), item, frame, colour))
        parts.append(_dot(frame.x(position), frame.y(item.mean), colour))
    return _drawing(f"{title}: {len(points)} trials", parts)


def calibration_curve(points: list[tuple[float, Interval]], *, title: str) -> Markup:
    """How often a model is right over its confidence, both from chance to certainty; the dotted line is equality.
    ``points`` are in order of x, which lies in [.5, 1]."""
    low_y = min(0.5, *(item.mean if item.low is None else item.low for _, item in points))
    frame = Frame(low_x=0.5, high_x=1.0, low_y=max(0.0, low_y - 0.02), high_y=1.0)
    ticks = nice_ticks(0.5, 1.0, 5)
    parts = [_y_axis(frame), _axis_below([frame.x(tick) for tick in ticks], tick_labels(ticks))]
    parts.append(Markup('<path class="guide" d="{}"/>').format(_path([(0.5, 0.5), (1.0, 1.0)], frame)))
    means = _path([(x, item.mean) for x, item in points], frame)
    parts += _joined([(frame.x(x), item) for x, item in points], means, frame)
    spoken = ", ".join(f"{text.number(item.mean)} at {text.number(x)}" for x, item in points)
    return _drawing(f"{title}: {spoken}", parts)


def histogram(edges: list[float], counts: list[int], *, title: str) -> Markup:
    """Columns between neighbouring edges; those below 0 have the second colour."""
    frame = Frame(low_x=edges[0], high_x=edges[-1], low_y=0.0, high_y=max(1, *counts) * 1.05)
    ticks = nice_ticks(edges[0], edges[-1], 5)
    parts = [_y_axis(frame)]
    for start, end, count in zip(edges, edges[1:], counts, strict=False):
        parts.append(
            Markup('<rect class="column s{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                0 if (start + end) / 2 > 0 else 1,
                frame.x(start) + 0.5,
                frame.y(count),
                max(0.5, frame.x(end) - frame.x(start) - 1),
                frame.y(0) - frame.y(count),
            )
        )
    parts.append(_axis_below([frame.x(tick) for tick in ticks], tick_labels(ticks)))
    wrong = sum(count for start, end, count in zip(edges, edges[1:], counts, strict=False) if start + end <= 0)
    return _drawing(f"{title}: {wrong} of {sum(counts)} below 0", parts)


def _joined(points: list[tuple[float, Interval]], line: str, frame: Frame) -> list[Markup]:
    """Dots on their intervals, joined by a line."""
    uprights = [_upright(x, item, frame) for x, item in points]
    dots = [_dot(x, frame.y(item.mean)) for x, item in points]
    return [*uprights, Markup('<path class="line s0" d="{}"/>').format(line), *dots]


def _drawing(spoken: str, parts: list[Markup]) -> Markup:
    return Markup('<svg class="curve" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, spoken, Markup("").join(parts)
    )


def _spoken(title: str, lines: list[Line]) -> str:
    parts = []
    for line in lines:
        known = [y for _, y in line.points if y is not None]
        who = "".join(f"{word} " for word in (line.tag, line.label) if word)
        parts.append(f"{who}from {text.compact(known[0])} to {text.compact(known[-1])}")
    return f"{title}: {', '.join(parts)}"


def _rule(x: float, y: float, end: float, kind: str) -> Markup:
    return Markup('<path class="{}" d="M{:.1f} {:.1f}H{:.1f}"/>').format(kind, x, y, end)


def _y_axis(frame: Frame) -> Markup:
    ticks = nice_ticks(frame.low_y, frame.high_y, 5)
    parts = []
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        parts.append(_rule(LEFT, frame.y(tick), WIDTH - RIGHT, "grid"))
        parts.append(_tick(LEFT - 6, f"{frame.y(tick) + 3.5:.1f}", "end", label))
    return Markup("").join(parts)


def _tick(x: object, y: object, anchor: str, label: str) -> Markup:
    return Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>').format(x, y, anchor, label)


def _guide(frame: Frame, value: float | None) -> Markup:
    """The dotted line, with its number at the axis unless a tick's is too close; empty without a value."""
    if value is None:
        return Markup("")
    y = frame.y(value)
    line = _rule(LEFT, y, WIDTH - RIGHT, "guide")
    if any(abs(frame.y(tick) - y) < MIN_LINE_GAP for tick in nice_ticks(frame.low_y, frame.high_y, 5)):
        return line
    return line + _tick(LEFT - 6, f"{y + 3.5:.1f}", "end", f"{value:.3g}".replace("-", text.MINUS))


def _x_axis(frame: Frame, last: float, *, whole: bool) -> Markup:
    ticks = [tick for tick in nice_ticks(max(0.0, frame.low_x), frame.high_x, 5) if tick <= last * (1 + 1e-9)]
    if whole:
        ticks = [tick for tick in ticks if tick == int(tick)]
    ticks = ticks or [last]
    return _axis_below([frame.x(tick) for tick in ticks], tick_labels(ticks))


def _axis_of_values(pixels: dict[float, float]) -> Markup:
    """An axis with a number under every value, except where it would overlap the number of a larger value."""
    labelled: list[float] = []
    for value in sorted(pixels, reverse=True):
        if not labelled or pixels[labelled[0]] - pixels[value] >= MIN_TICK_GAP:
            labelled.insert(0, value)
    return _axis_below([pixels[value] for value in labelled], tick_labels(labelled))


def _axis_below(pixels: list[float], labels: list[str]) -> Markup:
    numbers = [_tick(f"{x:.1f}", HEIGHT - 8, "middle", label) for x, label in zip(pixels, labels, strict=True)]
    return Markup("").join([_rule(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, "axis"), *numbers])


def _upright(x: float, item: Interval, frame: Frame, colour: int = 0) -> Markup:
    if item.low is None or item.high is None:
        return Markup("")
    bounds = frame.y(item.low), frame.y(item.high)
    return Markup('<path class="raw s{}" d="M{:.1f} {:.1f}V{:.1f}"/>').format(colour, x, *bounds)


def _dot(x: float, y: float, colour: int = 0) -> Markup:
    return Markup('<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(colour, x, y)


def _series(points: Points, frame: Frame, look: int | None) -> Markup:
    raw = _path(thinned(points, MAX_POINTS), frame)
    if len(points) < MIN_TO_SMOOTH:
        return Markup('<path class="line s{}" d="{}"/>').format(look, raw)
    smooth = _path(thinned(smoothed(points), MAX_POINTS), frame)
    return Markup('<path class="raw s{}" d="{}"/><path class="line s{}" d="{}"/>').format(look, raw, look, smooth)


def _path(points: Points, frame: Frame) -> str:
    """SVG path data. A single point becomes a line of length 0, which round caps draw as a dot."""
    strokes = []
    for segment in segments(points):
        pixels = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in segment]
        strokes.append("M" + "L".join(pixels) + ("h0" if len(pixels) == 1 else ""))
    return "".join(strokes)


def _end_labels(lines: list[Line], frame: Frame) -> Markup:
    """The last finite value of each line, shifted so that no two overlap."""
    ends = []
    for index, line in enumerate(lines):
        drawn = smoothed(line.points) if len(line.points) >= MIN_TO_SMOOTH else line.points
        x, y = [(x, y) for x, y in drawn if y is not None][-1]
        ends.append((frame.y(y), index, x, y))
    ends.sort()
    height = 14 + 11 * max(len(line.label.split()) for line in lines)
    parts: list[Markup] = []
    floor = float(TOP)
    room = len(ends) * height
    for pixel, index, x, y in ends:
        line = lines[index]
        top = min(max(pixel - 4, floor), HEIGHT - BOTTOM - room + 8)
        floor, room = top + height, room - height
        parts.append(mark((line.look or 0) if line.tag else 0, frame.x(x), pixel, f"dot s{line.look}"))
        value = f"{line.tag} {text.compact(y)}".strip()
        parts.append(_label(WIDTH - RIGHT + 7, top + 8, value, f"end s{line.look}"))
        for row, word in enumerate(line.label.split()):  # one word per row, because there is little room
            parts.append(_label(WIDTH - RIGHT + 7, top + 19 + 11 * row, word, f"tick s{line.look}"))
    return Markup("").join(parts)


MARKS = (
    "m-2.6 0a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0 -5.2 0z",
    "m-2.8 -2.8h5.6v5.6h-5.6z",
    "m0 -3.8l3.6 6.4h-7.2z",
    "m0 -4l4 4l-4 4l-4 -4z",
)
"""A circle, a square, a triangle, a diamond, so that colour is not the only difference between lines."""


def mark(look: int, x: float, y: float, kind: str) -> Markup:
    return Markup('<path class="{}" d="M{:.1f} {:.1f}{}"/>').format(kind, x, y, MARKS[look % len(MARKS)])


def swatch(look: int) -> Markup:
    """A short line with the mark of a series, for a legend."""
    line = Markup('<path class="line s{}" d="M2 6H34"/>').format(look)
    return Markup('<svg class="swatch" viewBox="0 0 36 12" aria-hidden="true">{}{}</svg>').format(
        line, mark(look, 18, 6, f"dot s{look}")
    )


def _label(x: float, y: float, words: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(kind, x, y, words)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """A horizontal axis in per cent of its width, so that an interval plot fits any screen without scaled text."""

    low: float
    high: float
    ticks: list[float]

    def percent(self, value: float) -> str:
        """The position of ``value``, as an SVG length."""
        return f"{(value - self.low) / (self.high - self.low) * 100:.2f}%"


def scale_of(intervals: list[Interval], *, within: tuple[float, float] | None, include: float | None) -> Scale:
    """The axis that contains all intervals and ``include``. ``within`` limits it (a score lies in [0, 1])."""
    values = [v for item in intervals for v in (item.mean, item.low, item.high) if v is not None]
    values += [] if include is None else [include]
    low, high = padded(values)
    if within:
        low, high = max(low, min(within[0], *values)), min(high, max(within[1], *values))
    return Scale(low=low, high=high, ticks=nice_ticks(low, high, 6))


def whisker(item: Interval, scale: Scale, *, tone: str, rule: float | None) -> Markup:
    """A dot on its interval; ``rule`` is the position of a reference line: no difference, or chance. The inner drawing
    is at half height, so its parts keep their size in a row of any height."""
    grid = [_vertical(scale.percent(tick), "grid") for tick in scale.ticks if tick != rule]
    if rule is not None:
        grid.append(_vertical(scale.percent(rule), "guide" if rule else "zero"))
    parts = []
    if item.low is not None and item.high is not None:
        low, high = scale.percent(item.low), scale.percent(item.high)
        parts.append(Markup('<line class="whisker" x1="{}" x2="{}" y1="0" y2="0"/>').format(low, high))
        for end in (low, high):
            parts.append(Markup('<line class="cap" x1="{}" x2="{}" y1="-6" y2="6"/>').format(end, end))
    parts.append(Markup('<circle class="dot" cx="{}" cy="0" r="4.5"/>').format(scale.percent(item.mean)))
    return Markup('<svg class="interval {}" aria-hidden="true">{}<svg y="50%">{}</svg></svg>').format(
        tone, Markup("").join(grid), Markup("").join(parts)
    )


def _vertical(x: str, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{}" x2="{}" y1="0" y2="100%"/>').format(kind, x, x)


def scale_axis(scale: Scale) -> Markup:
    labelled = zip(scale.ticks, tick_labels(scale.ticks), strict=True)
    parts = [_tick(scale.percent(tick), 14, "middle", label) for tick, label in labelled]
    return Markup('<svg class="interval foot" aria-hidden="true">{}</svg>').format(Markup("").join(parts))
