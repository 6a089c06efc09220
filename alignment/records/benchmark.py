"""``benchmark.json`` and ``samples.jsonl``: tasks of lm-evaluation-harness under several arms (docs/benchmark.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from alignment.core import typed_json
from alignment.core.artifacts import write_lines
from alignment.core.typed_json import Label, Name
from alignment.records import ResultFile
from alignment.records.evaluation import NO_DIFFERENCE, Comparison, Metric

FILE = "benchmark.json"
SAMPLES = "samples.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskMetric:
    """A metric of a task, after one of the task's filters: ``TaskMetric(name="acc", higher_is_better=True)``.

    ``filter`` is empty for answers that no filter changed. ``by_row``: the value is the mean of a score of each row, so
    arms can be compared row by row."""

    name: Name
    filter: Name = ""
    higher_is_better: bool = True
    by_row: bool = True

    @property
    def title(self) -> str:
        """``acc``, or ``exact_match,strict`` with a filter, as lm-evaluation-harness writes it."""
        return f"{self.name},{self.filter}" if self.filter else self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkTask:
    """A task: how many of its rows were measured, and the number of examples before each (None if its tasks differ in
    that).

    ``version`` is the task's own. Arms are compared by the first of ``metrics``. A ``group`` has the combined values of
    its tasks, so its rows are theirs."""

    name: Name
    group: bool = False
    version: Name = ""
    num_fewshot: int | None = None
    num_rows: int = 0
    all_rows: int = 0
    metrics: list[TaskMetric] = field(default_factory=list)

    def key(self, metric: TaskMetric) -> str:
        """``TASK/METRIC``, which names the metric everywhere else."""
        return f"{self.name}/{metric.title}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """The value of a metric and its standard error; None where lm-evaluation-harness gives none."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkArm:
    """An arm's values by ``TASK/METRIC``; ``seconds`` is how long it took."""

    name: Name
    label: Label = ""
    values: dict[Name, Measurement] = field(default_factory=dict)
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.name.removeprefix("stage:"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark(ResultFile):
    """All arms on all tasks.

    ``harness`` is the version of lm-evaluation-harness. ``comparisons`` are by the first metric of each task,
    ``other_comparisons`` by the others; each is a family of its own, over all tasks. ``cut``: a limit left rows out."""

    file: ClassVar[str] = FILE
    harness: Name = ""
    chat_template: bool = False
    tasks: list[BenchmarkTask] = field(default_factory=list)
    arms: list[BenchmarkArm] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    other_comparisons: list[Comparison] = field(default_factory=list)
    version: int = 1

    @property
    def cut(self) -> bool:
        """Whether a limit left out rows of a task."""
        return any(task.num_rows < task.all_rows for task in self.tasks)

    def label(self, name: str) -> str:
        return next((arm.label for arm in self.arms if arm.name == name), name.removeprefix("stage:"))

    def verdict(self, comparison: Comparison) -> str:
        """On the first arm of a comparison: ``better``, ``worse`` or ``no real difference``."""
        if not comparison.real:
            return NO_DIFFERENCE
        metrics = {task.key(metric): metric.higher_is_better for task in self.tasks for metric in task.metrics}
        metric = Metric(name=comparison.metric, higher_is_better=metrics.get(comparison.metric, True))
        return metric.direction(comparison.difference)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowAnswer:
    """What an arm did with a row: its ``scores`` by metric, and what they come from.

    ``logprobs`` are those of the row's choices, or of its text, in nats; ``text`` is a generated answer."""

    scores: dict[Name, float] = field(default_factory=dict)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkRow:
    """A row of a task with every arm's answer. ``id`` is the SHA-256 that lm-evaluation-harness gives its content,
    ``prompt`` the text that the arm read, or that of the first choice."""

    task: Name
    number: int
    id: Name = ""
    prompt: str = ""
    target: str = ""
    answers: dict[Name, RowAnswer] = field(default_factory=dict)


def write_rows(folder: Path, rows: list[BenchmarkRow]) -> None:
    """Writes ``SAMPLES`` into an artifact's folder."""
    write_lines(folder / SAMPLES, map(typed_json.to_json, rows))
