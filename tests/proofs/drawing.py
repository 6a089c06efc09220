"""Charts of the report's kind as one file that stands alone, its colours light or dark as the reader's are.

``python -m tests.proofs.drawing CARD.JSON FILE.SVG`` draws a reward model's card (docs/reward_card.md).
"""

from __future__ import annotations

import sys
from pathlib import Path

from markupsafe import Markup

from alignment.report.card_page import plots
from alignment.report.plots import HEIGHT, WIDTH, Line, curve
from alignment.report.reward_card import read_card

_TITLE = 34
_STYLE = Markup("""
svg { --ink: #201e1a; --muted: #6b665b; --rule: #e0dbcf; --one: #1d5a86; --two: #b0562b; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e7e3da; --muted: #a09b90; --rule: #34363c; --one: #7fb6dc; --two: #e09a72; }
}
text { font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
.title { font-size: 13px; font-weight: 600; fill: var(--ink); }
.grid, .axis { stroke: var(--rule); fill: none; }
.tick { font-size: 10.5px; fill: var(--muted); }
.raw, .line { fill: none; stroke: var(--one); stroke-linejoin: round; stroke-linecap: round; }
.raw { opacity: .35; } .line { stroke-width: 2; }
.raw.s1, .line.s1 { stroke: var(--two); }
.dot.s0, .end.s0, .tick.s0 { fill: var(--one); }
.dot.s1, .end.s1, .tick.s1 { fill: var(--two); }
.end { font-size: 12px; font-weight: 600; }
.guide { stroke: var(--muted); stroke-dasharray: 1.5 3; fill: none; }
.column { fill: var(--one); opacity: .6; } .column.s1 { fill: var(--two); }
""")


def draw(file: Path, panels: dict[str, list[Line]], *, below: str) -> None:
    """One curve under another, each under its title; ``below`` names the horizontal axis."""
    stack(file, {title: curve(lines, title=title, guide=None) for title, lines in panels.items()}, below=below)


def stack(file: Path, panels: dict[str, Markup], *, below: str) -> None:
    """One chart under another, each under its title."""
    height = _TITLE + HEIGHT
    parts = [Markup("<style>{}</style>").format(_STYLE)]
    for number, (title, chart) in enumerate(panels.items()):
        top = number * height
        parts.append(Markup('<text class="title" x="8" y="{}">{}</text>').format(top + 22, title))
        parts.append(Markup('<svg y="{}" width="{}" height="{}">{}</svg>').format(top + _TITLE, WIDTH, HEIGHT, chart))
    whole = len(panels) * height + 20
    parts.append(
        Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(WIDTH / 2, whole - 8, below)
    )
    svg = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" width="{}" height="{}">{}</svg>\n')
    file.write_text(svg.format(WIDTH, whole, 2 * WIDTH, 2 * whole, Markup("").join(parts)), encoding="utf-8")


def draw_card(card: Path, file: Path) -> None:
    """How sure a reward model is and how right, and its margins."""
    found = read_card(card, "card")
    assert found is not None, f"{card} is no card"
    below = "score of the better answer − that of the worse"
    stack(file, {f"{one.title}: {one.caption}": one.svg for one in plots(found)}, below=below)


if __name__ == "__main__":
    draw_card(Path(sys.argv[1]), Path(sys.argv[2]))
