"""Parts of a ``StageKind`` that several kinds share. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignment.data.tokens.limits import Limits
from alignment.evaluation.arm_labels import labels
from alignment.stages.base import Curve, Reported

ROW_COUNTS = ("rows", "rows_too_long", "rows_cut")


def curve(title: str, unit: str, key: str, guide: float | None = None) -> Curve:
    """A chart of one metric."""
    return Curve(title=title, unit=unit, keys=(key,), guide=guide)


def next_token_curves(_: Mapping[str, Any]) -> list[Curve]:
    """Charts of a stage that learns to predict tokens."""
    return [curve("Loss", "nats a token", "loss"), curve("Next-token accuracy", "share", "mean_token_accuracy")]


def next_token_metrics(_: Any) -> Reported:
    """Metrics of a stage that learns to predict tokens."""
    return Reported(training=("loss",), counts=ROW_COUNTS)


def limits_of_parts(config: Any) -> Limits:
    """Limits of a stage that bounds whole rows, their prompts and their answers."""
    return Limits(
        row=config.max_length,
        prompt=config.max_prompt_length,
        answer=config.max_answer_length,
        too_long=config.too_long,
    )


def of_arms(metrics: tuple[str, ...], arms: list[str]) -> tuple[str, ...]:
    """``metric/label`` for each metric of each arm."""
    return tuple(f"{metric}/{label}" for metric in metrics for label in labels(arms).values())


def replay_advice(name: str) -> str:
    """Advice for stage ``name``, which learns from its own texts, if its policy forgot too much."""
    return (
        f"use replay: stages.{name}.data.mix=[{{source: 'bundled:general/conversations', share: 0.2}}] adds general "
        f"rows to its data; or lower stages.{name}.optim.lr, train fewer epochs, or train an adapter"
    )
