"""The page of metrics: rules that score answers, figures of an evaluation's arms, and those of each kind of stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from alignment.config.data import ValidationConfig
from alignment.config.sweep import ArmMetric
from alignment.config.typed import to_plain
from alignment.records.evaluation import ARM_METRICS, ArmResult
from alignment.rewards.rules.all_rules import RULES
from alignment.stages.base import Reported, StageKind
from book.markdown import own_docstring, table
from book.settings_pages import our_kinds

_INTRO = """\
# Metrics

A *rule* scores an answer. An *arm* of an evaluation, which is a model or prompt that is compared, has the mean of such
scores and further figures. A *stage* that trains writes a line of figures for each step (in RL: update) to
`metrics.jsonl`, and the last figures into its `manifest.json`.

[Evaluation](../evaluation.md) says how to read a difference, and [Rewards](../rewards.md) what each rule does."""


def page() -> str:
    """The page."""
    parts = [
        _INTRO,
        "## Rules",
        "Each name is a `source` of a scorer or of a metric.",
        table(["source", "setting", "column of the row", "package"], _rules()),
        "## Figures of an arm",
        own_docstring(ArmResult),
        "In addition to the recipe's own metrics, `evaluation.json` has these for every arm: "
        + ", ".join(f"`{name}`" for name in ARM_METRICS)
        + ". The objective of a sweep can also name "
        + ", ".join(f"`{member.value}`" for member in ArmMetric)
        + ".",
        *(_kind(kind) for kind in our_kinds().values()),
    ]
    return "\n\n".join(part for part in parts if part)


def _rules() -> Iterator[tuple[str, str, str, str]]:
    for name, rule in RULES.items():
        setting = f"`{rule.setting}`" + ("" if rule.needs else " (optional)") if rule.setting else "–"
        package = f"`{rule.package.requirement}`" if rule.package else "–"
        yield f"`{name}`", setting, f"`{rule.reads}`" if rule.reads else "–", package


def _looked_at(kind: StageKind) -> Any:
    """Default settings of a kind, with validation if it can have one, so that its figures are listed too."""
    config = kind.config()
    if not hasattr(config, "validation"):
        return config
    return replace(config, validation=ValidationConfig(every=1, share=0.1))


def _kind(kind: StageKind) -> str:
    """The figures of a kind of stage; empty if it reports none."""
    config = _looked_at(kind)
    reported: Reported = kind.metrics(config)
    curves = kind.display.curves(to_plain(config))
    manifest = [
        ("measured on held-out rows", reported.held_out),
        ("measured on the training rows", reported.training),
        ("counts", reported.counts),
    ]
    rows = [(words, ", ".join(f"`{name}`" for name in names)) for words, names in manifest if names]
    parts = [f"## {kind.name}"]
    if rows:
        parts += [
            "In the manifest, with default settings, and with validation if the kind supports it:",
            table(["what", "names"], rows),
        ]
    if curves:
        charts = ((", ".join(f"`{key}`" for key in curve.keys), curve.title, curve.unit or "–") for curve in curves)
        parts += ["At each step, as plotted in the report:", table(["names", "chart", "unit"], charts)]
    return "\n\n".join(parts) if len(parts) > 1 else ""
