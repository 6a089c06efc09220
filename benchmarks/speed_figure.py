"""Draws speed against memory of every setting in the tables, as docs/speed.svg: ``python -m benchmarks.speed_figure``.

x is peak memory in GB, y the work in a second, divided by that of our default setting; up and left is better. A panel
holds one work, whose settings were measured in turn on one machine. Medians, from the stored results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, ROOT

WORKS = {"sft_lora": "SFT", "reward_lora": "reward model", "dpo_lora": "DPO", "ppo_lora": "PPO"}
LIBRARIES = {"ours": ("alignment", "#1f6feb"), "trl": ("TRL", "#d1691a"), "stock": ("plain transformers", "#4d7a3c")}
"""By the first word of a contestant's name: name and colour."""
SAME_WORK = ("ours_larger", "ours_recomputed")
PANEL = (310, 220)
LEFT, RIGHT, TOP, BOTTOM = 36, 16, 34, 34
LEGEND = 44
MOST_MEMORY, MOST_SPEED = 8.0, 1.6


def settings(content: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Peak memory in GB and speed relative to our default setting, by the name of the contestant.

    The speed of a rival is the median of the ratios measured in turn. Variants of ours that do less work are left out.
    """
    ours = content["ours"]
    variants = {name: content["other_variants_of_ours"].get(name) for name in SAME_WORK}
    points = {
        name: (figures["peak_memory"] / 1e9, _speed(figures) / _speed(ours))
        for name, figures in {"ours": ours, **variants}.items()
        if figures is not None
    }
    for name, figures in content["rivals"].items():
        ratio = content["ratios"][name]
        faster = ratio["tokens_per_second"] if "tokens_per_second" in ratio else 1 / ratio["seconds_per_update"]
        points[name] = (figures["peak_memory"] / 1e9, 1 / faster)
    return points


def _speed(figures: Mapping[str, float]) -> float:
    return 1 / figures["seconds_per_step" if "seconds_per_step" in figures else "seconds_per_update"]


def drawing(contents: Mapping[str, Mapping[str, Any]]) -> str:
    """The figure as SVG: a panel for each work, two beside each other, and a legend.

    Raises:
        ValueError: a setting lies outside the axes.
    """
    width, height = 2 * PANEL[0], (len(contents) + 1) // 2 * PANEL[1] + LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12" fill="#24292f">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for index, (work, content) in enumerate(contents.items()):
        corner = (index % 2 * PANEL[0], index // 2 * PANEL[1])
        parts.append(f'<g transform="translate{corner}">{_panel(WORKS[work], content)}</g>')
    for index, (name, colour) in enumerate(LIBRARIES.values()):
        x = LEFT + 130 * index
        parts += [_dot(x, height - 29, colour), _text(x + 9, height - 25, name)]
    dates = " and ".join(sorted({content["date"] for content in contents.values()}))
    parts.append(
        _text(LEFT, height - 8, f"speed against peak memory; large dot: our default setting; measured {dates}")
    )
    return "\n".join([*parts, "</svg>", ""])


def _panel(title: str, content: Mapping[str, Any]) -> str:
    parts = [
        f'<text x="{LEFT}" y="16" font-weight="bold">{title}, {content["conditions"]["processor"]["model"]}</text>'
    ]
    parts.append(_text(LEFT, TOP - 4, "speed, ours = 1"))
    for speed in (0.0, 0.5, 1.0, 1.5):
        y = _y(speed)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{PANEL[0] - RIGHT}" stroke="#d0d7de"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{speed:g}", "end"))
    for memory in (0.0, 2.0, 4.0, 6.0, 8.0):
        unit = " GB" if memory == MOST_MEMORY else ""
        parts.append(_text(_x(memory), PANEL[1] - BOTTOM + 16, f"{memory:g}{unit}", "middle"))
    for name, (memory, speed) in settings(content).items():
        if memory > MOST_MEMORY or speed > MOST_SPEED:
            raise ValueError(f"{title}, {name}: {memory:.1f} GB and speed {speed:.2f} lie outside the axes")
        colour = LIBRARIES[name.split("_")[0]][1]
        parts.append(_dot(_x(memory), _y(speed), colour, radius=6 if name == "ours" else 4))
    return "\n".join(parts)


def _x(memory: float) -> float:
    return LEFT + memory / MOST_MEMORY * (PANEL[0] - LEFT - RIGHT)


def _y(speed: float) -> float:
    return PANEL[1] - BOTTOM - speed / MOST_SPEED * (PANEL[1] - TOP - BOTTOM)


def _dot(x: float, y: float, colour: str, radius: int = 4) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" fill-opacity=".85"/>'


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{words}</text>'


def main(folder: Path = RESULTS) -> None:
    """Writes the figure from the stored results."""
    contents = {work: json.loads((folder / f"{work}.json").read_text(encoding="utf-8")) for work in WORKS}
    (ROOT / "docs" / "speed.svg").write_text(drawing(contents), encoding="utf-8")
    print(f"docs/speed.svg: {', '.join(contents)}")


if __name__ == "__main__":
    main()
