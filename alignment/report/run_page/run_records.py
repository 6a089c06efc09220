"""The data of a report, as plain records between reading and drawing. Every field that a run may lack is optional, so
that the drawing code says what is missing instead of failing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.config import yaml_file
from alignment.core.artifacts import EVALUATION, REPORT, Manifest
from alignment.core.errors import ConfigError
from alignment.records.cost import StageCost
from alignment.records.evaluation import (
    FEWEST_PROMPTS,
    LEVEL,
    NO_DIFFERENCE,
    TOO_FEW,
    Evaluation,
    Metric,
    Sample,
    adjusted_p_in_words,
)
from alignment.records.interval import Interval
from alignment.records.reward_card import RewardCard
from alignment.records.run import COMPLETE, RunRecord, StageEntry
from alignment.records.stages import ArmForgetting
from alignment.records.stages import Forgetting as ForgettingRecord
from alignment.records.training import METRICS
from alignment.report.kit import text
from alignment.stages.base import ResultTable
from alignment.stages.registry import produced_by


def artifact_folder(run_folder: Path, stage: str, entry: StageEntry) -> Path | None:
    """Where the stage's artifact is or will be. run.json may hold a path or a folder name. The name is looked up next
    to the run first, so that a run that was moved together with its artifacts can still be read."""
    recorded = entry.artifact or _stage_file(run_folder / stage / "stage.yaml").get("artifact")
    if not isinstance(recorded, str) or not recorded:
        return None
    beside = run_folder.resolve().parent.parent / "artifacts" / Path(recorded).name
    return beside if beside.exists() or work_folder(beside).exists() else run_folder.resolve().parent.parent / recorded


def _stage_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml_file.read(path)
    except ConfigError:
        return {}
    return content if isinstance(content, dict) else {}


def work_folder(artifact: Path) -> Path:
    return artifact.with_name(artifact.name + ".work")


def steps_file(artifact: Path) -> Path | None:
    """The metrics.jsonl of a stage; that of an unfinished stage is in its work folder."""
    folders = (artifact, work_folder(artifact) / "content")
    return next((folder / METRICS for folder in folders if (folder / METRICS).is_file()), None)


def evaluation_stages(record: RunRecord) -> list[str]:
    """The evaluations of a run: the one that its report names first, then the last one, and so on."""
    stages = record.stages.items()
    reports = [entry for _, entry in stages if produced_by(entry.kind) == REPORT]
    named = {ref.removeprefix("stage:") for entry in reports for _, ref in entry.references}
    evaluations = [name for name, entry in reversed(stages) if produced_by(entry.kind) == EVALUATION]
    return list(dict.fromkeys([*(name for name in record.stages if name in named), *evaluations]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The run number ``run`` minus the first one, in a metric of an arm's answers, paired by prompt. ``interval`` is
    None if the runs were evaluated on different ``prompts``. ``adjusted_p`` is the p value of a randomisation test,
    corrected for the differences in this metric; None where every prompt has equal scores. ``unscored`` prompts lack a
    score in one of the runs, such as a grade, and do not count. ``evaluation`` is the stage that has the answers, or
    empty for the evaluation that the report of each run shows."""

    run: int
    arm: str
    metric: Metric
    interval: Interval | None
    prompts: int = 0
    adjusted_p: float | None = None
    unscored: int = 0
    evaluation: str = ""

    @property
    def real(self) -> bool:
        """Whether the difference is more than chance, on enough prompts."""
        return self.prompts >= FEWEST_PROMPTS and self.adjusted_p is not None and self.adjusted_p < LEVEL

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` than in the first run, or why neither can be said."""
        if self.interval is not None and self.prompts < FEWEST_PROMPTS:
            return TOO_FEW
        if self.interval is None or not self.real:
            return NO_DIFFERENCE
        return self.metric.direction(self.interval.mean)

    @property
    def p_in_words(self) -> str:
        """``, adjusted p 0.012``, to put behind the interval; empty where there is none."""
        return adjusted_p_in_words(self.adjusted_p)

    @property
    def without(self) -> str:
        """What does not count, to put behind the interval; empty if all prompts do."""
        prompts = "prompt that has" if self.unscored == 1 else "prompts that have"
        return f", without {self.unscored} {prompts} no score in one of the runs" if self.unscored else ""

    @property
    def none_at_all(self) -> bool:
        """Whether every answer has equal scores in both runs: usually an arm that the runs share."""
        return self.interval is not None and self.interval.mean == 0.0 and self.adjusted_p is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Forgetting:
    """The results of a ``forgetting`` stage; ``note`` says why there are none."""

    stage: str
    record: ForgettingRecord | None = None
    note: str = ""

    @property
    def failed(self) -> list[ArmForgetting]:
        """Arms that exceed the limits."""
        return [] if self.record is None else [arm for arm in self.record.arms if not arm.passed]


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A reward model's card, and the stage that made it."""

    stage: str
    record: RewardCard


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOutRows:
    """Rows that a stage left out or cut for the same reason, and the ``first`` of them in words."""

    why: str
    count: int
    first: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stage and its state in the run. ``inputs`` are (field, reference) pairs. ``metrics`` are the lines of
    metrics.jsonl. ``notes`` say in words what could not be read; ``error`` is the worker's message about a failure.
    ``planned`` is what ``align plan --cost`` said before. ``seconds`` is the time of all its ``attempts``. ``left_out``
    are the rows of its data that it did not use."""

    name: str
    kind: str
    state: str
    artifact: str = ""
    seconds: float | None = None
    attempts: int = 1
    inputs: list[tuple[str, str]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    manifest: Manifest | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""
    planned: StageCost | None = None
    left_out: list[LeftOutRows] = field(default_factory=list)

    @property
    def headlines(self) -> dict[str, float]:
        """The finite figures of its manifest, by name."""
        metrics = self.manifest.metrics if self.manifest else {}
        values = {name: text.finite(value) for name, value in metrics.items()}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """The tables of a stage whose kind brings its own; ``note`` says why there are none."""

    stage: str
    tables: list[ResultTable] = field(default_factory=list)
    note: str = ""

    @property
    def shown(self) -> bool:
        """Whether there is anything to show; most kinds bring no table."""
        return bool(self.tables or self.note)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """Whether an evaluation meets a gate, and the figures in words."""

    met: bool
    sentence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Everything that the page shows. If ``evaluation`` is None, ``evaluation_note`` says why. ``other_evaluations``
    says which one it is if the run has several."""

    record: RunRecord
    stages: list[Stage]
    evaluation: Evaluation | None
    evaluation_note: str
    samples: list[Sample]
    samples_note: str
    cards: list[Card] = field(default_factory=list)
    forgetting: list[Forgetting] = field(default_factory=list)
    tables: list[Tables] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)
    other_evaluations: str = ""

    @property
    def num_complete(self) -> int:
        return sum(stage.state in COMPLETE for stage in self.stages)

    @property
    def unfinished(self) -> list[Stage]:
        """Stages without a usable artifact, except the report itself, which is still running while the page is made."""
        return [stage for stage in self.stages if produced_by(stage.kind) != REPORT and stage.state not in COMPLETE]
