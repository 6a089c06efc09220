"""Runs tasks of lm-evaluation-harness on every arm, and compares arms row by row."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alignment.core.errors import ConfigError, DataError
from alignment.core.typed_json import to_json
from alignment.data.tokens.tokenize import STOPS, end_ids
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.evaluation.paired_scores import labels
from alignment.evaluation.statistics import Intervals, compare
from alignment.models.assembly.load import lineage
from alignment.models.assembly.prefix import positions_of
from alignment.records.benchmark import Benchmark, BenchmarkArm, BenchmarkRow, BenchmarkTask, TaskMetric, write_rows
from alignment.stages.benchmark.kind import BASE, INSTALL, BenchmarkConfig, content, selected
from alignment.stages.benchmark.tasks import HARNESS
from alignment.stages.shared.answer_sampling import counted_progress
from alignment.stages.shared.policies import Policies, refuse_without_template, tokenizer_of
from alignment.stages.shared.result import StageResult
from alignment.training.context import StageContext


def run(config: BenchmarkConfig, context: StageContext) -> StageResult:
    """Policies in, ``benchmark.json`` and ``samples.jsonl`` out, on one process."""
    where = f"stages.{context.spec.stage}"
    planned = context.spec.identity.get("files")
    if planned is not None and dict(content(config, where)) != planned:
        raise DataError(
            "the tasks, their data or the harness changed since the run was planned",
            where=f"{where}.task_folders",
            remedy="start the run again to plan it again",
        )
    _import_harness(where)
    from alignment.stages.benchmark import harness_run

    context.progress("loading")
    harness_run.seed_generators()
    chosen = selected(config)
    loaded = harness_run.load(chosen, config.tasks, context.spec.work, context.spec.extra_data, where=f"{where}.tasks")
    random_state = harness_run.random_state()
    policies = Policies(context)
    runs: dict[str, harness_run.ArmRun] = {}
    seconds: dict[str, float] = {}
    for number, name in enumerate(config.arms, start=1):
        started = time.monotonic()
        model = _model(config, context, policies, name, phase=f"arm {number}/{len(config.arms)}")
        harness_run.restore(random_state)
        runs[name] = harness_run.run_arm(model, loaded, chosen, config, name=name, where=f"{where}.tasks")
        del model  # its weights are free again when the next one is loaded
        seconds[name] = time.monotonic() - started
    policies.release()
    record = _record(config, context, runs, seconds)
    return _written(context, record, _rows(runs, record.tasks))


def rehearse(config: BenchmarkConfig, context: StageContext) -> None:
    """Tries the tasks before a run trains anything, with the same answer to every request.

    Raises:
        AlignmentError: the harness or a task cannot be loaded, or a function of a task fails."""
    _import_harness(f"stages.{context.spec.stage}")
    from alignment.stages.benchmark.harness_run import try_tasks

    try_tasks(config, context)


def _import_harness(where: str) -> None:
    # Standard errors of a few metrics are resampled, by default in as many processes as there are cores.
    os.environ.setdefault("LMEVAL_DISABLE_MULTIPROC", "1")
    try:
        importlib.import_module("lm_eval.evaluator")
    except ImportError as error:
        raise ConfigError(f"lm-evaluation-harness cannot be imported: {error}", where=where, remedy=INSTALL) from error


def _model(config: BenchmarkConfig, context: StageContext, policies: Policies, name: str, *, phase: str) -> Any:
    from alignment.stages.benchmark.harness_model import HarnessModel

    spec = context.spec
    tokenizer = tokenizer_of(context, spec.arms[name], load_tokenizer(spec.base_path, spec.model.template))
    if config.apply_chat_template:
        refuse_without_template(context, spec.arms[name], tokenizer)
    model = policies.load(lineage(spec, spec.arms[name]))
    positions = positions_of(model.base_model)
    if config.max_length is not None and config.max_length > positions:
        raise ConfigError(
            f"{config.max_length} is more than the {positions} positions of {name}",
            where=f"stages.{spec.stage}.max_length",
            remedy="lower it, or set it to null for all positions",
        )
    # As the harness has them: EOS, and those of generation_config.json; in a conversation also the end of a turn.
    ends = (
        end_ids(tokenizer) if config.apply_chat_template else {tokenizer.eos_token_id, *getattr(tokenizer, STOPS, ())}
    )
    return HarnessModel(
        model, tokenizer, config, end_ids=sorted(ends), where=f"arm {name}", progress=counted_progress(context, phase)
    )


def _record(
    config: BenchmarkConfig, context: StageContext, runs: Mapping[str, Any], seconds: Mapping[str, float]
) -> Benchmark:
    label_of = labels(config.arms)
    tasks: list[BenchmarkTask] = _of_all(runs)
    intervals = Intervals(samples=config.bootstrap_samples, seed=context.seed("bootstrap"))
    firsts = [(task, task.metrics[0]) for task in tasks if task.metrics]
    others = [(task, metric) for task in tasks for metric in task.metrics[1:]]
    return Benchmark(
        harness=importlib.metadata.version(HARNESS),
        chat_template=config.apply_chat_template,
        tasks=tasks,
        arms=[
            BenchmarkArm(name=name, label=label_of[name], values=dict(run.values), seconds=seconds[name])
            for name, run in runs.items()
        ],
        comparisons=compare(_scores(firsts, runs), reference=BASE, intervals=intervals),
        other_comparisons=compare(_scores(others, runs), reference=BASE, intervals=intervals),
    )


def _of_all(runs: Mapping[str, Any]) -> list[BenchmarkTask]:
    """The tasks, each with the metrics of all arms; a metric is ``by_row`` only if it is for every arm."""
    tasks_of_arms = [{task.name: task for task in run.tasks} for run in runs.values()]
    return [_of_arms([tasks[name] for tasks in tasks_of_arms]) for name in tasks_of_arms[0]]


def _of_arms(task_of_arms: list[BenchmarkTask]) -> BenchmarkTask:
    by_row = [{metric.title for metric in task.metrics if metric.by_row} for task in task_of_arms]
    metrics = {metric.title: metric for task in reversed(task_of_arms) for metric in task.metrics}
    titles = dict.fromkeys(metric.title for task in task_of_arms for metric in task.metrics)
    return replace(
        task_of_arms[0],
        metrics=[replace(metrics[title], by_row=all(title in of_arm for of_arm in by_row)) for title in titles],
    )


def _scores(
    metrics: list[tuple[BenchmarkTask, TaskMetric]], runs: Mapping[str, Any]
) -> dict[str, dict[str, list[float]]]:
    """Each row's score by ``TASK/METRIC`` and arm, for metrics that have one."""
    return {
        task.key(metric): {
            name: [row.answers[name].scores[metric.title] for _, row in sorted(run.rows[task.name].items())]
            for name, run in runs.items()
        }
        for task, metric in metrics
        if metric.by_row
    }


def _rows(runs: Mapping[str, Any], tasks: list[BenchmarkTask]) -> list[BenchmarkRow]:
    """The rows of all tasks, each with the answers of all arms."""
    first = next(iter(runs.values()))
    return [
        replace(row, answers={name: run.rows[task.name][number].answers[name] for name, run in runs.items()})
        for task in tasks
        for number, row in sorted(first.rows.get(task.name, {}).items())
    ]


def _written(context: StageContext, record: Benchmark, rows: list[BenchmarkRow]) -> StageResult:
    record.write(context.content)
    write_rows(context.content, rows)
    context.trackers.table("benchmarks", _table(record))
    context.trackers.table("samples", [to_json(row) for row in rows])
    return StageResult(metrics=_headlines(record))


def _table(record: Benchmark) -> list[dict[str, Any]]:
    return [
        {
            "task": task.name,
            "metric": metric.title,
            "arm": arm.label,
            "value": arm.values[task.key(metric)].value,
            "stderr": arm.values[task.key(metric)].stderr,
            "examples": task.num_fewshot,
            "rows": task.num_rows,
        }
        for task in record.tasks
        for metric in task.metrics
        for arm in record.arms
        if task.key(metric) in arm.values
    ]


def _headlines(record: Benchmark) -> dict[str, float]:
    """The metrics of the manifest: ``TASK/METRIC/ARM``, and how many rows were measured and left out."""
    values = {f"{key}/{arm.label}": measured.value for arm in record.arms for key, measured in arm.values.items()}
    leaves = [task for task in record.tasks if not task.group]
    rows = sum(task.num_rows for task in leaves)
    return {**values, "rows": float(rows), "rows_left_out": float(sum(task.all_rows for task in leaves) - rows)}
