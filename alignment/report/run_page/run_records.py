"""What the report knows of a run, as plain records between reading and drawing.

Every field that a run may lack is optional here, so that the drawing code states what is missing instead of failing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from alignment.core.artifacts import REPORT, Manifest
from alignment.records.evaluation import Evaluation, Metric
from alignment.records.forgetting import ArmForgetting
from alignment.records.forgetting import Forgetting as ForgettingRecord
from alignment.records.interval import Interval
from alignment.records.reward_card import RewardCard
from alignment.records.run import COMPLETE, RunRecord
from alignment.report.kit import text
from alignment.stages.registry import produced_by


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The run of this place less the first one, in a metric of an arm's answers, paired by prompt.

    ``interval`` is None where they were judged on other prompts.
    """

    run: int
    arm: str
    metric: Metric
    interval: Interval | None

    @property
    def real(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and self.interval.excludes_zero()

    @property
    def none_at_all(self) -> bool:
        """Whether every answer was judged alike: mostly an arm that the runs share."""
        return self.interval == Interval(mean=0.0, low=0.0, high=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Forgetting:
    """What a stage of that kind measured; ``note`` says why there is nothing to show."""

    stage: str
    record: ForgettingRecord | None = None
    note: str = ""

    @property
    def failed(self) -> list[ArmForgetting]:
        """Arms that lost more than the limits allow."""
        return [] if self.record is None else [arm for arm in self.record.arms if not arm.passed]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One arm's answer with its score by each metric, and its ``merit``: the score by the primary metric, negated where
    less is better; None without one."""

    arm: str
    text: str
    scores: dict[str, float]
    merit: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A held-out prompt with every arm's answer; ``messages`` are (role, text) pairs."""

    id: str
    task: str
    messages: list[tuple[str, str]]
    reference: str
    answers: list[Answer]


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A reward model's card, and the stage that made it."""

    stage: str
    record: RewardCard


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stage as the run left it.

    ``inputs`` are (field, reference) pairs. ``metrics`` are the lines of metrics.jsonl. ``notes`` say in words what
    could not be read; ``error`` is the worker's own account of a failure.
    """

    name: str
    kind: str
    state: str
    reason: str = ""
    artifact: str = ""
    seconds: float | None = None
    inputs: list[tuple[str, str]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    manifest: Manifest | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def headlines(self) -> dict[str, float]:
        """The finite figures of its manifest, by name."""
        metrics = self.manifest.metrics if self.manifest and isinstance(self.manifest.metrics, dict) else {}
        values = {name: text.finite(value) for name, value in metrics.items()}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Everything the page shows. ``evaluation`` is None where there is none, and ``evaluation_note`` says why."""

    record: RunRecord
    stages: list[Stage]
    evaluation: Evaluation | None
    evaluation_note: str
    samples: list[Sample]
    samples_note: str
    cards: list[Card] = field(default_factory=list)
    forgetting: list[Forgetting] = field(default_factory=list)

    @property
    def unfinished(self) -> list[Stage]:
        """Stages that have no usable artifact; the report's own stage is under way while this page is made."""
        return [stage for stage in self.stages if produced_by(stage.kind) != REPORT and stage.state not in COMPLETE]
