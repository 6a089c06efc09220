"""Runs the harness for one arm, and reads what it returns."""

from __future__ import annotations

import math
import random
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from alignment.core.errors import DataError, NonFiniteError, StageError
from alignment.records.benchmark import BenchmarkTask, Measurement, RowAnswer, TaskMetric
from alignment.stages.benchmark.config import BenchmarkConfig
from alignment.stages.benchmark.harness_tasks import Loaded, described, prepare, remedy_for
from alignment.stages.benchmark.task_choice import Chosen

UNFILTERED = "none"
"""The harness's name of the filter that changes nothing."""
_SEEDS = (0, 1234, 1234)
"""Those that the harness's command starts ``random``, NumPy and PyTorch with; tasks may draw."""
_CLOSE = 1e-9
_PACKAGE = Path(__file__).parents[2]


class RandomState:
    """The state of all random generators after the tasks were loaded, so that every arm gets the same prompts."""

    def __init__(self) -> None:
        self._state: tuple[Any, Any, torch.Tensor] | None = None

    @staticmethod
    def seed() -> None:
        """Starts them as the harness's command does."""
        random.seed(_SEEDS[0])
        np.random.seed(_SEEDS[1])
        torch.manual_seed(_SEEDS[2])

    def save(self) -> None:
        """Remembers the present state."""
        self._state = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def restore(self) -> None:
        """Goes back to it."""
        assert self._state is not None, "saved once the tasks are loaded"
        random.setstate(self._state[0])
        np.random.set_state(self._state[1])
        torch.set_rng_state(self._state[2])


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRow:
    """A row of a task as an arm answered it."""

    id: str
    prompt: str
    target: str
    answer: RowAnswer


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmRun:
    """One arm: its tasks with their metrics, the values by ``TASK/METRIC``, and the rows of each task by number."""

    tasks: list[BenchmarkTask]
    values: dict[str, Measurement]
    rows: dict[str, dict[int, SampleRow]]


def run_arm(model: LM, loaded: Loaded, chosen: Chosen, config: BenchmarkConfig, *, name: str, where: str) -> ArmRun:
    """Has the harness ask ``model`` all tasks; ``name`` names the arm in errors.

    Raises:
        DataError: the right answer of a row is not one of its choices.
        NonFiniteError: a value is not finite.
        StageError: the harness, or a function of a task, failed.
    """
    prepare(loaded, num_fewshot=config.num_fewshot)
    try:
        results = evaluate(
            lm=model,
            task_dict=loaded,
            limit=config.limit,
            bootstrap_iters=config.bootstrap_samples,
            log_samples=True,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=True,
            confirm_run_unsafe_code=False,
        )
    except Exception as error:
        if _is_ours(error):
            raise
        raise StageError(
            f"the harness failed: {described(error, chosen)}",
            where=where,
            remedy=remedy_for(error, otherwise="correct the task's file, its functions or its rows, and run again"),
        ) from error
    for task_name, task in loaded["tasks"].items():
        _refuse_wrong_targets(results["samples"][task_name], task, where=f"{where}: {task_name}")
    tasks = [*_tasks(results, loaded), *_groups(results)]
    values = {
        task.key(metric): _measurement(results, task.name, metric, name) for task in tasks for metric in task.metrics
    }
    return ArmRun(
        tasks=tasks,
        values=values,
        rows={task: dict(_rows(samples)) for task, samples in results["samples"].items()},
    )


def _is_ours(error: Exception) -> bool:
    """Whether code of this package below the harness raised the error, or memory ran out: the worker reports those."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    last = next(file for file in reversed(files) if Path(file).is_relative_to(_PACKAGE))
    own = type(error).__module__.startswith("alignment.")
    of_system = isinstance(error, OSError) and error.errno is not None  # not a hub's error
    return own or of_system or isinstance(error, (MemoryError, torch.OutOfMemoryError)) or last != __file__


def _refuse_wrong_targets(samples: Sequence[Mapping[str, Any]], task: Any, *, where: str) -> None:
    """The harness counts such a row as wrong, and mentions it only in its log."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:
        return
    for sample in samples:
        choices = task.doc_to_choice(sample["doc"])
        targets = sample["target"] if isinstance(sample["target"], list) else [sample["target"]]
        for target in targets:
            if target not in range(len(choices)) if isinstance(target, int) else target not in choices:
                raise DataError(
                    f"the right answer of row {sample['doc_id']} is {target!r}, which is not one of its choices: "
                    f"{', '.join(map(repr, choices))}",
                    where=where,
                    remedy="correct the row, or doc_to_target in the task's file",
                )


# ---- what the harness returns ----------------------------------------------------------------------------------------


def _tasks(results: Mapping[str, Any], loaded: Loaded) -> list[BenchmarkTask]:
    return [
        BenchmarkTask(
            name=name,
            version=str(results["versions"].get(name, "")),
            num_fewshot=int(results["n-shot"].get(name, 0)),
            num_rows=int(results["n-samples"][name]["effective"]),
            all_rows=int(results["n-samples"][name]["original"]),
            metrics=_in_order(list(_metrics(results, name)), task),
        )
        for name, task in loaded["tasks"].items()
    ]


def _groups(results: Mapping[str, Any]) -> list[BenchmarkTask]:
    """Groups for which the harness gives a value of all their tasks together."""
    counts = results["n-samples"]
    groups = []
    for name in results.get("groups") or {}:
        below = [counts[task] for task in _below(name, results["group_subtasks"]) if task in counts]
        groups.append(
            BenchmarkTask(
                name=name,
                group=True,
                version=str(results["versions"].get(name) or ""),
                num_fewshot=results["n-shot"].get(name),
                num_rows=sum(int(count["effective"]) for count in below),
                all_rows=sum(int(count["original"]) for count in below),
                metrics=list(_metrics(results, name)),
            )
        )
    return groups


def _below(name: str, children: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for child in children.get(name, ()):
        yield child
        yield from _below(child, children)


def _in_order(metrics: list[TaskMetric], task: Any) -> list[TaskMetric]:
    """As the task's file lists them; the first one is what arms are compared by."""
    listed = [str(metric.get("metric")) for metric in task.get_config("metric_list") or []]
    return sorted(metrics, key=lambda metric: listed.index(metric.name) if metric.name in listed else len(listed))


def _metrics(results: Mapping[str, Any], name: str) -> Iterator[TaskMetric]:
    """The metrics of a task or group, from the keys ``METRIC,FILTER`` of its results."""
    directions = results["higher_is_better"].get(name, {})
    for key, value in results["results"].get(name, results.get("groups", {}).get(name, {})).items():
        metric, comma, of_filter = key.partition(",")
        if comma and not metric.endswith("_stderr") and _is_number(value):
            scores = _scores(results["samples"].get(name, []), metric, of_filter)
            yield TaskMetric(
                name=metric,
                filter="" if of_filter == UNFILTERED else of_filter,
                higher_is_better=directions.get(metric) is not False,
                by_row=bool(scores) and math.isclose(sum(scores) / len(scores), value, rel_tol=_CLOSE, abs_tol=_CLOSE),
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _scores(samples: Sequence[Mapping[str, Any]], metric: str, of_filter: str) -> list[float]:
    """Each row's score; empty if the metric has no number for each row."""
    scores: list[Any] = [sample.get(metric) for sample in samples if sample["filter"] == of_filter]
    return [float(score) for score in scores] if all(map(_is_score, scores)) else []


def _is_score(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.number, np.bool_))


def _measurement(results: Mapping[str, Any], task: str, metric: TaskMetric, arm: str) -> Measurement:
    of_task = results["results"].get(task) or results["groups"][task]
    of_filter = metric.filter or UNFILTERED
    value = float(of_task[f"{metric.name},{of_filter}"])
    if not math.isfinite(value):
        raise NonFiniteError(
            f"{metric.title} of {arm} in {task} is {value}",
            remedy="its training went wrong: lower its learning rate, or leave out the arm",
        )
    stderr = of_task.get(f"{metric.name}_stderr,{of_filter}")
    has_stderr = _is_number(stderr) and math.isfinite(stderr)
    return Measurement(value=value, stderr=float(stderr) if has_stderr else None)


def _rows(samples: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, SampleRow]]:
    """The rows of a task; the harness lists a row once for each filter."""
    by_number: dict[int, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_number.setdefault(int(sample["doc_id"]), []).append(sample)
    for number, of_row in by_number.items():
        first = of_row[0]
        yield (
            number,
            SampleRow(
                id=first["doc_hash"],
                prompt=str(first["arguments"][0][0]),
                target=str(first["target"]),
                answer=RowAnswer(scores=_scores_of_row(of_row), **_answered([resps[0] for resps in first["resps"]])),
            ),
        )


def _scores_of_row(of_row: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        TaskMetric(name=metric, filter="" if sample["filter"] == UNFILTERED else sample["filter"]).title: float(
            sample[metric]
        )
        for sample in of_row
        for metric in sample["metrics"]
        if _is_score(sample[metric])
    }


def _answered(answers: Sequence[Any]) -> dict[str, Any]:
    """The log-probabilities, or the text, of the answers to a row's requests."""
    if all(isinstance(answer, str) for answer in answers):
        return {"text": answers[0]}
    return {"logprobs": [float(answer[0] if isinstance(answer, (tuple, list)) else answer) for answer in answers]}
