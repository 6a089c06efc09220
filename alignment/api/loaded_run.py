"""A run or a sweep as read from its folder, and its tables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.core.artifacts import EVALUATION, FORGETTING, REWARD_CARD, Manifest, read_manifest
from alignment.core.errors import ArtifactError, ConfigError
from alignment.pipeline.execute.run_state import as_it_is
from alignment.pipeline.execute.run_view import KILLED, RUNNING
from alignment.records import evaluation as evaluations
from alignment.records import reward_card
from alignment.records.evaluation import Comparison, Evaluation, Sample
from alignment.records.reward_card import RewardCard
from alignment.records.run import RunRecord, StageEntry
from alignment.records.stages import FORGETTING_FILE, Forgetting
from alignment.records.sweep_record import SweepRecord, Trial
from alignment.records.training import written_rows
from alignment.records.worker import Progress, Status
from alignment.report.kit.text import flat
from alignment.report.run_page.curves import points_of
from alignment.report.run_page.run_records import (
    Difference,
    artifact_folder,
    evaluation_stages,
    steps_file,
    work_folder,
)
from alignment.stages.registry import curves, produced_by

if TYPE_CHECKING:
    import pandas


def _comparisons(evaluation: Evaluation) -> Iterator[tuple[str, Comparison]]:
    for comparison in evaluation.comparisons:
        yield comparison.metric or evaluation.primary or "", comparison
    for comparison in evaluation.other_comparisons:
        yield comparison.metric, comparison
    for comparison in evaluation.reward_comparisons:
        yield comparison.metric or "reward", comparison


def with_others(first: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The ``first`` columns, then the others in the order in which rows have them."""
    return list(dict.fromkeys([*first, *(name for row in rows for name in row)]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """A line of a chart: ``Series(title="Loss", unit="", key="loss", label="", over="step", points=[(1.0, 2.31)])``.
    ``key`` is the metric's name in metrics.jsonl. ``points`` are (x, y) pairs; x is the step, or the square root of the
    metric ``over``. y is None where the logged value is not finite."""

    title: str
    unit: str
    key: str
    label: str
    over: str
    points: list[tuple[float, float | None]]


def data_frame(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> pandas.DataFrame:
    """A DataFrame with these columns in this order, also without rows; a row may lack a column. Raises ConfigError:
    pandas is not installed."""
    try:
        import pandas
    except ImportError:
        remedy = "pip install 'alignment-pipeline[pandas]'"
        raise ConfigError("tables need pandas, which is not installed here", remedy=remedy) from None
    return pandas.DataFrame(list(rows), columns=list(columns))


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class RunStage:
    """A stage of a run. ``entry`` is what the run recorded of it: its kind, state, reason and inputs. ``folder`` is the
    stage's folder of the run, with ``stage.yaml`` and ``log.txt``. ``artifact`` is the folder of its result and
    ``manifest`` what that says of itself; both are None until the stage is done. ``progress`` is how far a stage got
    that is running or was killed, ``error`` how an unfinished one ended. ``settings`` are plain data."""

    name: str
    entry: StageEntry
    folder: Path
    artifact: Path | None
    manifest: Manifest | None
    progress: Progress | None
    error: str
    settings: dict[str, Any]
    steps_path: Path | None

    @property
    def kind(self) -> str:
        """The kind of stage."""
        return self.entry.kind

    @property
    def state(self) -> str:
        """``waiting``, ``running``, ``killed``, ``done``, ``reused`` or ``failed``."""
        return self.entry.state

    @property
    def metrics(self) -> dict[str, float]:
        """The headline metrics of the result, by name; empty until the stage is done."""
        return {} if self.manifest is None else self.manifest.metrics

    @property
    def usage(self) -> dict[str, float]:
        """What making the result took: ``seconds``, ``peak_rss_bytes`` and others; empty until the stage is done."""
        return {} if self.manifest is None else self.manifest.usage

    def steps(self) -> list[dict[str, Any]]:
        """The logged steps of the stage, finished or not, as metrics.jsonl has them; empty if it logs none. Raises
        ArtifactError: the file is damaged."""
        if self.steps_path is None:
            return []
        try:
            return written_rows(self.steps_path)
        except ValueError as error:
            raise ArtifactError(f"unreadable: {error}", where=str(self.steps_path), remedy="run it again") from error

    def curves(self) -> list[Series]:
        """What the report draws of the steps: a series for each figure that was logged. It raises as ``steps`` does."""
        steps = self.steps()
        return [
            Series(title=chart.title, unit=chart.unit, key=key, label=label, over=chart.over or "step", points=points)
            for chart in curves(self.kind, self.settings)
            for key, label in zip(chart.keys, chart.labels, strict=True)
            if (points := points_of(steps, key, chart.over))
        ]

    def frame(self) -> pandas.DataFrame:
        """A row for each logged step: ``step``, then a column for each metric.

        Raises:
            ArtifactError: metrics.jsonl is damaged.
            ConfigError: pandas is not installed."""
        return data_frame(with_others(["step"], steps := self.steps()), steps)

    def __repr__(self) -> str:
        return f"RunStage({self.name!r}, {self.kind}, {self.state})"


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Run:
    """A run: ``state`` is ``running``, ``done``, ``gate not met``, ``failed``, ``preempted``, ``interrupted``,
    ``waiting``, ``killed`` or ``unknown``. ``record`` is the content of run.json. ``evaluations``, ``reward_cards`` and
    ``forgetting`` are the results of the stages that have one, by stage. Tables (``..._frame``) raise ConfigError if
    pandas is not installed."""

    folder: Path
    state: str
    record: RunRecord
    stages: dict[str, RunStage]
    evaluations: dict[str, Evaluation]
    reward_cards: dict[str, RewardCard]
    forgetting: dict[str, Forgetting]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.record.name or self.folder.name

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as plain data, with those of the stages under ``stages``."""
        return self.record.config

    @property
    def evaluation(self) -> Evaluation | None:
        """The evaluation that the run's report shows: the one that it names, or else the last with a result."""
        name = self._evaluation_name()
        return None if name is None else self.evaluations[name]

    def answers(self, evaluation: str | None = None) -> list[Sample]:
        """The held-out prompts of an evaluation with every arm's answers and scores.

        ``evaluation`` names its stage; without it, the one of the report. Empty if it has no result.

        Raises:
            ArtifactError: the file of the answers is damaged."""
        name = evaluation or self._evaluation_name()
        stage = self.stages.get(name) if name is not None else None
        return [] if stage is None or stage.artifact is None else list(evaluations.read_samples(stage.artifact))

    def against(self, first: Run) -> list[Difference]:
        """This run minus ``first``, in every metric of every arm that both evaluated, paired by prompt. Raises
        ArtifactError: a result of one of the runs is damaged."""
        from alignment.pipeline.execute import run_differences  # needs numpy

        runs = [run_differences.judged_run(run.folder) for run in (first, self)]
        compared = run_differences.compared_evaluations(runs)
        return [
            difference for evaluation in compared for difference in run_differences.differences_from_first(evaluation)
        ]

    def stages_frame(self) -> pandas.DataFrame:
        """A row for each stage: ``stage``, ``kind``, ``state``, ``reason``, ``artifact``, and a column for each figure
        of its ``usage``."""
        columns = ("kind", "state", "reason", "artifact")
        rows = [
            {"stage": stage.name, **{column: getattr(stage.entry, column) for column in columns}, **stage.usage}
            for stage in self.stages.values()
        ]
        return data_frame(with_others(["stage", *columns, "seconds"], rows), rows)

    def arms_frame(self) -> pandas.DataFrame:
        """A row for each arm and metric: ``evaluation``, ``arm``, ``metric``, ``mean``, and the 95 % interval
        from ``low`` to ``high``."""
        columns = ("evaluation", "arm", "metric", "mean", "low", "high")
        rows = (
            (stage, arm.label, metric, value.mean, value.low, value.high)
            for stage, evaluation in self.evaluations.items()
            for arm in evaluation.arms
            for metric, value in arm.all_metrics.items()
        )
        return data_frame(columns, (dict(zip(columns, row, strict=True)) for row in rows))

    def differences_frame(self) -> pandas.DataFrame:
        """A row for each comparison of two arms: ``evaluation``, ``arm``, ``against``, ``metric``, ``difference``
        (paired by prompt) with its 95 % interval, ``p``, ``adjusted_p`` for its family, and ``verdict``."""
        numbers = ("difference", "low", "high", "p", "adjusted_p")
        rows = [
            {
                "evaluation": stage,
                "arm": evaluation.label(comparison.arm),
                "against": evaluation.label(comparison.against),
                "metric": metric,
                **{name: getattr(comparison, name) for name in numbers},
                "verdict": evaluation.verdict(comparison),
            }
            for stage, evaluation in self.evaluations.items()
            for metric, comparison in _comparisons(evaluation)
        ]
        return data_frame(("evaluation", "arm", "against", "metric", *numbers, "verdict"), rows)

    def answers_frame(self, evaluation: str | None = None) -> pandas.DataFrame:
        """A row for each prompt and arm: ``id``, ``task``, ``prompt`` (its last message), ``arm``, ``answer``, and a
        column for each score, which is ``score/NAME`` if the metric is called like one of these. It raises as
        ``answers`` does."""
        columns = ("id", "task", "prompt", "arm", "answer")
        rows = [
            {
                "id": sample.id,
                "task": sample.task,
                "prompt": sample.messages[-1].get("content", "") if sample.messages else "",
                "arm": arm.removeprefix("stage:"),
                "answer": answer.text,
                **{f"score/{name}" if name in columns else name: score for name, score in answer.scores.items()},
            }
            for sample in self.answers(evaluation)
            for arm, answer in sample.answers.items()
        ]
        return data_frame(with_others(columns, rows), rows)

    def settings_frame(self) -> pandas.DataFrame:
        """A row for each setting: ``key``, as an override names it, and ``value``."""
        rows = [{"key": key, "value": value} for key, value in flat(self.settings).items()]
        return data_frame(("key", "value"), rows)

    def _evaluation_name(self) -> str | None:
        return next((name for name in evaluation_stages(self.record) if name in self.evaluations), None)

    def __repr__(self) -> str:
        states = ", ".join(f"{stage.name} {stage.state}" for stage in self.stages.values())
        return f"Run({str(self.folder)!r}, {self.state}: {states})"


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Reads a run, whether or not it has ended; ``folder`` is ``runs/NAME`` in the output folder.

    A run that was moved can be read if ``runs`` and ``artifacts`` were moved together.

    Raises:
        ArtifactError: no run is recorded there, or a file of it is damaged or was written by a newer version."""
    path = Path(folder).expanduser().absolute()
    record = RunRecord.read(path)
    known = as_it_is(path, record)
    stages = {name: _stage(path, name, known) for name in record.stages}

    def with_file(kind: str, file: str) -> list[tuple[str, Path]]:
        made = [(s.name, s.artifact) for s in stages.values() if s.artifact and produced_by(s.kind) == kind]
        return [(name, artifact) for name, artifact in made if (artifact / file).is_file()]

    return Run(
        folder=path,
        state=known.state,
        record=record,
        stages=stages,
        evaluations={name: Evaluation.read(path) for name, path in with_file(EVALUATION, evaluations.FILE)},
        reward_cards={name: RewardCard.read(path) for name, path in with_file(REWARD_CARD, reward_card.FILE)},
        forgetting={name: Forgetting.read(path) for name, path in with_file(FORGETTING, FORGETTING_FILE)},
    )


def _stage(run_folder: Path, name: str, record: RunRecord) -> RunStage:
    entry, folder = record.stages[name], run_folder / name
    artifact = artifact_folder(run_folder, name, entry)
    manifest = None if artifact is None else read_manifest(artifact)
    status = None if entry.complete else Status.read(folder)
    working = artifact if entry.state in (RUNNING, KILLED) else None
    return RunStage(
        name=name,
        entry=entry,
        folder=folder,
        artifact=artifact if manifest is not None else None,
        manifest=manifest,
        progress=None if working is None else Progress.read(work_folder(working)),
        error="" if status is None else status.error,
        settings=record.settings_of(name),
        steps_path=None if artifact is None else steps_file(artifact),
    )


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Sweep:
    """The trials of a sweep that have ended; ``record`` is the content of sweep.json."""

    folder: Path
    record: SweepRecord

    @property
    def trials(self) -> list[Trial]:
        """All trials: the best first, failed and pruned ones last."""
        return self.record.trials

    @property
    def best(self) -> list[Trial]:
        """The best trial, several if they tie, or the Pareto set if there are several goals; empty until one is
        done."""
        return [trial for trial in self.trials if trial.number in self.record.best]

    def run(self, number: int) -> Run:
        """The run of a trial. Raises ArtifactError: there is no such trial, or its run is damaged."""
        trial = next((trial for trial in self.trials if trial.number == number), None)
        if trial is None:
            numbers = ", ".join(str(trial.number) for trial in self.trials)
            raise ArtifactError(f"no trial {number}", where=str(self.folder), remedy=f"one of: {numbers}")
        return load_run(self.folder.parents[1] / "runs" / trial.run)

    def frame(self) -> pandas.DataFrame:
        """A row for each trial: ``trial``, ``state``, a column for each setting, and for each goal its mean under the
        goal's label and the ends of its 95 % interval under ``LABEL low`` and ``LABEL high``.

        Raises:
            ConfigError: pandas is not installed."""
        keys = [parameter.key for parameter in self.record.parameters]
        labels = [goal.label for goal in self.record.goals]
        figures = [name for label in labels for name in (label, f"{label} low", f"{label} high")]
        return data_frame(["trial", "state", *keys, *figures], (_row(trial, figures) for trial in self.trials))

    def __repr__(self) -> str:
        best = "; ".join(" ".join(trial.words) for trial in self.best)
        return f"Sweep({str(self.folder)!r}, {len(self.trials)} of {self.record.number} trials; best: {best or 'none'})"


def _row(trial: Trial, figures: Sequence[str]) -> dict[str, Any]:
    values = [number for value in trial.figures for number in (value.mean, value.low, value.high)]
    row = {"trial": trial.number, "state": trial.state, **trial.settings}
    return row | dict(zip(figures, values, strict=False))


def load_sweep(folder: str | os.PathLike[str]) -> Sweep:
    """Reads a sweep, whether or not it has ended; ``folder`` is ``sweeps/RUN.SWEEP`` in the output folder. Raises
    ArtifactError: no trial of a sweep has ended there, or its file is damaged."""
    path = Path(folder).expanduser().absolute()
    try:
        return Sweep(folder=path, record=SweepRecord.read(path))
    except FileNotFoundError:
        remedy = "start one: align sweep RECIPE SWEEP"
        raise ArtifactError("no trial of a sweep has finished here", where=str(path), remedy=remedy) from None
