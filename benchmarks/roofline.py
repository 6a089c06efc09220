"""Draws what the measured works reach of this machine's roof, as docs/roofline.svg: ``python -m benchmarks.roofline``.

x is useful FLOP for each byte of weights read once a pass, y FLOP/s, both logarithmic (Williams et al. 2009). The roof
is the bfloat16 matrix-product peak noted with the newest measurements, and this machine's bandwidth measured now by
copying. A work that was measured on a machine with another peak is left out.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import RESULTS, ROOT, processor
from benchmarks.setting import PROMPTS, ROWS

WIDTH, HEIGHT = 560, 330
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 20, 44
X_RANGE, Y_RANGE = (1.0, 1e4), (1e9, 1e13)
COPIED = 256 << 20
"""Bytes copied at once to measure the bandwidth: more than any cache here gives back."""
BYTES_PER_WEIGHT = 2
SAME_PEAK = 0.1
"""Largest relative difference of peaks on one machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """What a work of ours reaches: useful FLOP for each byte of weights, the share of the peak, and the peak in FLOP/s,
    measured on ``date``."""

    intensity: float
    mfu: float
    peak: float
    date: str


def bandwidth() -> float:
    """Bytes/s read and written together, the best of several copies."""
    source = torch.ones(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - started)
    return 2 * COPIED / best


def reached(name: str, folder: Path) -> Point | None:
    """The point of a work of ours, from its results; None where there are none.

    Raises:
        ValueError: it was measured on another kind of machine, whose bandwidth cannot be measured here.
    """
    file = folder / f"{name}.json"
    if not file.exists():
        return None
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if (other := content["conditions"]["processor"]) != processor():
        raise ValueError(f"{name} was measured on {other['model']}; measure it here first: make bench WORK={name}")
    ours = [entry["result"] for entry in content["measurements"] if entry["contestant"] == "ours" and "result" in entry]
    peaks = content.get("peaks", {"bfloat16": max(result["matmul_peak"] for result in ours)})  # older results have none
    peak, mfu = peaks["bfloat16"], content["ours"]["mfu"]
    weights = sum(content["parameters"]["base"].values()) * BYTES_PER_WEIGHT
    if name == "sampling":  # a step reads all weights and makes one token a row
        intensity = 2 * PROMPTS / BYTES_PER_WEIGHT
    else:  # weights are read forward and backward
        intensity = mfu * peak * content["ours"]["seconds_per_step"] / (2 * weights)
    return Point(intensity=intensity, mfu=mfu, peak=peak, date=content["date"])


def under_one_roof(points: Mapping[str, Point]) -> tuple[float, dict[str, Point]]:
    """The newest peak, and the points that were measured on a machine with this peak."""
    roof = max(points.values(), key=lambda point: point.date).peak
    return roof, {name: point for name, point in points.items() if abs(point.peak - roof) <= SAME_PEAK * roof}


def _x(value: float) -> float:
    low, high = (math.log10(end) for end in X_RANGE)
    return LEFT + (math.log10(value) - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def _y(value: float) -> float:
    low, high = (math.log10(end) for end in Y_RANGE)
    return TOP + (high - math.log10(value)) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{words}</text>'


def drawing(points: Mapping[str, Point], *, peak: float, bytes_per_second: float) -> str:
    """The figure as SVG: roof, points and labels."""
    knee = peak / bytes_per_second
    roof = [(X_RANGE[0], X_RANGE[0] * bytes_per_second), (knee, peak), (X_RANGE[1], peak)]
    path = " ".join(f"{_x(x):.1f},{_y(y):.1f}" for x, y in roof)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<polyline points="{path}" fill="none" stroke="#444" stroke-width="1.5"/>',
        _text(_x(X_RANGE[1]), _y(peak) - 6, f"bf16 products {peak / 1e12:.2f} TFLOP/s", "end"),
        _text(_x(2.0), _y(2.0 * bytes_per_second) - 8, f"copies {bytes_per_second / 1e9:.0f} GB/s"),
    ]
    for power in range(9, 14):
        parts.append(_text(LEFT - 6, _y(10.0**power) + 4, f"10{_raised(power)}", "end"))
    for power in range(5):
        parts.append(_text(_x(10.0**power), HEIGHT - BOTTOM + 16, f"10{_raised(power)}", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "useful FLOP for each byte of weights", "middle"))
    parts.append(_text(LEFT, TOP - 6, "useful FLOP/s"))
    for number, (name, point) in enumerate(points.items(), start=1):  # points lie close, so names stand in a list
        x, y = _x(point.intensity), _y(point.mfu * point.peak)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#1f6feb"/>')
        parts.append(_text(x, y - 6, str(number), "middle"))
        speed = f"{point.mfu * point.peak / 1e12:.2f} TFLOP/s, {100 * point.mfu:.0f} % of the products' peak"
        share = f"{number} {name}: {speed} ({point.date})"
        parts.append(_text(_x(20.0), _y(10.0**9.9) + 15 * number, share))
    return "\n".join([*parts, "</svg>", ""])


def _raised(power: int) -> str:
    return "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(power))


def main() -> None:
    """Writes the figure from the results that there are."""
    works = ("sft_lora", "sft_full", "reward_lora", "dpo_lora", "sampling")
    try:
        points = {name: reached(name, RESULTS) for name in works}
    except ValueError as error:
        raise SystemExit(str(error)) from None
    known = {name.replace("_", " "): point for name, point in points.items() if point is not None}
    if not known:
        raise SystemExit("no results yet; run 'make bench' first")
    peak, drawn = under_one_roof(known)
    figure = drawing(drawn, peak=peak, bytes_per_second=bandwidth())
    (ROOT / "docs" / "roofline.svg").write_text(figure, encoding="utf-8")
    print(f"docs/roofline.svg: {', '.join(drawn)}; {ROWS} rows a step")
    if left_out := known.keys() - drawn:
        print(f"left out, because another peak was measured with them: {', '.join(sorted(left_out))}")


if __name__ == "__main__":
    main()
