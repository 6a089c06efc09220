"""Charts of the report's kind as one file that stands alone, its colours light or dark as the reader's are."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from alignment.report.plots import HEIGHT, WIDTH, Line, curve

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
""")


def draw(file: Path, panels: dict[str, list[Line]], *, below: str) -> None:
    """One chart under another, each under its title; ``below`` names the horizontal axis."""
    height = _TITLE + HEIGHT
    parts = [Markup("<style>{}</style>").format(_STYLE)]
    for number, (title, lines) in enumerate(panels.items()):
        top = number * height
        parts.append(Markup('<text class="title" x="8" y="{}">{}</text>').format(top + 22, title))
        parts.append(
            Markup('<svg y="{}" width="{}" height="{}">{}</svg>').format(
                top + _TITLE, WIDTH, HEIGHT, curve(lines, title=title, guide=None)
            )
        )
    whole = len(panels) * height + 20
    parts.append(
        Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(WIDTH / 2, whole - 8, below)
    )
    svg = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" width="{}" height="{}">{}</svg>\n')
    file.write_text(svg.format(WIDTH, whole, 2 * WIDTH, 2 * whole, Markup("").join(parts)), encoding="utf-8")
