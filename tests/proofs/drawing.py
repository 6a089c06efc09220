"""Charts of the report's kind as one file that stands alone, its colours light or dark as the reader's are.

``python -m tests.proofs.drawing CARD.JSON FILE.SVG`` draws a reward model's card (docs/reward_card.md).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from alignment.core import typed_json
from alignment.records.interval import Interval
from alignment.records.reward_card import RewardCard
from alignment.report.kit import text
from alignment.report.kit.plots import HEIGHT, WIDTH, Line, Scale, curve, scale_axis, scale_of, whisker
from alignment.report.run_page.run_tables import plots

_TITLE = 34
_ROW, _NAME, _PLOT, _VALUE = 26, 130, 270, 60
"""Of a row of intervals: its height, and the widths of its name, its plot and its figure."""
_STYLE = Markup("""
svg { overflow: visible; --ink: #201e1a; --muted: #6b665b; --rule: #e0dbcf; --one: #1d5a86; --two: #b0562b; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e7e3da; --muted: #a09b90; --rule: #34363c; --one: #7fb6dc; --two: #e09a72; }
}
text { font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
.title { font-size: 13px; font-weight: 600; fill: var(--ink); }
.name { font-size: 12px; fill: var(--ink); }
.grid, .axis { stroke: var(--rule); fill: none; }
.tick { font-size: 10.5px; fill: var(--muted); }
.raw, .line { fill: none; stroke: var(--one); stroke-linejoin: round; stroke-linecap: round; }
.raw { opacity: .35; } .line { stroke-width: 2; }
.raw.s1, .line.s1 { stroke: var(--two); }
.dot.s0, .end.s0, .tick.s0 { fill: var(--one); }
.dot.s1, .end.s1, .tick.s1 { fill: var(--two); }
.end { font-size: 12px; font-weight: 600; }
.zero { stroke: var(--muted); } .guide { stroke: var(--ink); stroke-dasharray: 2 3; }
.whisker, .cap { stroke-width: 1.5; }
.column { fill: var(--one); opacity: .6; } .column.s1 { fill: var(--two); }
.s0 .whisker, .s0 .cap { stroke: var(--one); } .s0 .dot { fill: var(--one); }
.s1 .whisker, .s1 .cap { stroke: var(--two); } .s1 .dot { fill: var(--two); }
""")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A named interval; ``tone`` is ``s0`` or ``s1``, one colour or the other."""

    name: str
    interval: Interval
    tone: str


def draw(file: Path, panels: dict[str, list[Line]], *, below: str) -> None:
    """One curve under another, each under its title; ``below`` names the horizontal axis."""
    stack(file, {title: curve(lines, title=title, guide=None) for title, lines in panels.items()}, below=below)


def stack(file: Path, panels: dict[str, Markup], *, below: str) -> None:
    height = _TITLE + HEIGHT
    parts = []
    for number, (title, chart) in enumerate(panels.items()):
        top = number * height
        parts.append(_title(title, top))
        parts.append(Markup('<svg y="{}" width="{}" height="{}">{}</svg>').format(top + _TITLE, WIDTH, HEIGHT, chart))
    _write(file, parts, width=WIDTH, height=len(panels) * height, below=below)


def draw_intervals(file: Path, panels: dict[str, tuple[list[Row], float]], *, below: str) -> None:
    parts: list[Markup] = []
    top = 0
    for title, (rows, limit) in panels.items():
        scale = scale_of([row.interval for row in rows], within=None, include=limit)
        parts.append(_title(title, top))
        parts += [_interval_row(row, scale, top + _TITLE + index * _ROW) for index, row in enumerate(rows)]
        bottom = top + _TITLE + len(rows) * _ROW
        dotted = Markup('<line class="guide" x1="{0}" x2="{0}" y1="0" y2="100%"/>').format(scale.percent(limit))
        parts += [_plot(dotted, top + _TITLE, len(rows) * _ROW), _plot(scale_axis(scale), bottom, 20)]
        top = bottom + 24
    _write(file, parts, width=_NAME + _PLOT + _VALUE, height=top, below=below)


def _interval_row(row: Row, scale: Scale, top: int) -> Markup:
    name = Markup('<text class="name" x="8" y="{}">{}</text>').format(top + 17, row.name)
    figure = Markup('<text class="name" x="{}" y="{}" text-anchor="end">{}</text>').format(
        _NAME + _PLOT + _VALUE - 6, top + 17, text.signed(row.interval.mean)
    )
    return name + _plot(whisker(row.interval, scale, tone=row.tone, rule=0.0), top, _ROW) + figure


def _plot(inner: Markup, top: int, height: int) -> Markup:
    return Markup('<svg x="{}" y="{}" width="{}" height="{}">{}</svg>').format(_NAME, top, _PLOT, height, inner)


def _title(title: str, top: int) -> Markup:
    return Markup('<text class="title" x="8" y="{}">{}</text>').format(top + 22, title)


def _write(file: Path, parts: Sequence[Markup], *, width: int, height: int, below: str) -> None:
    whole = height + 20
    parts = [
        Markup("<style>{}</style>").format(_STYLE),
        *parts,
        Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(width / 2, whole - 8, below),
    ]
    svg = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" width="{}" height="{}">{}</svg>\n')
    file.write_text(svg.format(width, whole, 2 * width, 2 * whole, Markup("").join(parts)), encoding="utf-8")


def draw_card(card: Path, file: Path) -> None:
    titles = ("Share right, over how sure it is", "Pairs, over the margin of their scores")
    figures = plots(typed_json.read(card, RewardCard, remedy=""))
    stack(file, dict(zip(titles, (figure["svg"] for figure in figures), strict=True)), below="left of 0 it is wrong")


if __name__ == "__main__":
    draw_card(Path(sys.argv[1]), Path(sys.argv[2]))
