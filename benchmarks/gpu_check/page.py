"""Writes what was tried on a card as ``docs/gpu/<card>.md``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.card import Card
from benchmarks.gpu_check.checks import Outcome
from benchmarks.machine import versions

SIMULATED = "simulated"
"""The first word of the name of a device that is none (tests/simulated_device)."""


def text_of(card: Card, outcomes: Sequence[Outcome], *, commit: str, date: str) -> str:
    """The page in Markdown."""
    passed = sum(outcome.passed for outcome in outcomes)
    lines = [f"# {card.name}", ""]
    if card.name.startswith(SIMULATED):
        lines += ["**Not a card:** a simulated device. Seconds and speeds are those of the CPU.", ""]
    lines += [
        f"Written by `make gpu-check` on {date}, commit {commit}: {passed} of {len(outcomes)} checks passed.",
        "",
        f"- devices: {card.count}, {card.memory / 2**30:.0f} GiB each, compute capability {card.capability}",
        f"- CUDA or ROCm of PyTorch: {card.cuda}",
        "- " + ", ".join(f"{name} {version}" for name, version in versions().items()),
        "",
        "| check | what | outcome | seconds |",
        "|---|---|---|---|",
    ]
    for outcome in outcomes:
        state = "passed" if outcome.passed else "**failed**"
        lines.append(f"| {outcome.check.name} | {outcome.check.about} | {state} | {outcome.seconds:.0f} |")
    for outcome in outcomes:
        lines += _details(outcome)
    return "\n".join(lines) + "\n"


def _details(outcome: Outcome) -> list[str]:
    lines = []
    if outcome.faults:
        lines += ["", f"## What failed: {outcome.check.name}", "", "```", *outcome.faults, "```"]
    if outcome.figures:
        lines += ["", f"## Measured: {outcome.check.name}", "", "| figure | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in outcome.figures.items()]
    return lines


def write(card: Card, outcomes: Sequence[Outcome], *, folder: Path, commit: str, date: str) -> Path:
    """Writes the page, in place of an earlier one of this card."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{card.slug}.md"
    page.write_text(text_of(card, outcomes, commit=commit, date=date), encoding="utf-8")
    return page
