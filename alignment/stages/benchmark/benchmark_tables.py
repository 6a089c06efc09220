"""A result of benchmarks as lines for the terminal and as tables for pages and model cards."""

from __future__ import annotations

from pathlib import Path

from alignment.records.benchmark import FILE, Benchmark, BenchmarkArm, BenchmarkTask, Measurement, TaskMetric
from alignment.records.evaluation import BETTER, WORSE, Comparison, p_in_short
from alignment.stages.base import Cell, ResultTable

_TONES = {BETTER: "good", WORSE: "bad"}
_ABSENT = "–"


def lines(artifact: Path) -> list[str]:
    """A line for each metric of each task with every arm's value, then one for each comparison by a task's first
    metric; none without ``benchmark.json``."""
    if not (artifact / FILE).is_file():
        return []
    record = Benchmark.read(artifact)
    return [
        *(_line(record, task, metric) for task in record.tasks for metric in task.metrics),
        *(_in_words(record, comparison) for comparison in record.comparisons),
    ]


def _line(record: Benchmark, task: BenchmarkTask, metric: TaskMetric) -> str:
    values = ", ".join(f"{arm.label} {_in_short(arm.values.get(task.key(metric)))}" for arm in record.arms)
    return f"{task.key(metric)}, {_conditions(task)}: {values}"


def _conditions(task: BenchmarkTask) -> str:
    rows = f"{task.num_rows} rows" if task.num_rows == task.all_rows else f"{task.num_rows} of {task.all_rows} rows"
    return rows if task.num_fewshot is None else f"{task.num_fewshot}-shot, {rows}"


def _in_short(measured: Measurement | None) -> str:
    if measured is None:
        return _ABSENT
    return f"{measured.value:.3f}" + ("" if measured.stderr is None else f" ± {measured.stderr:.3f}")


def _in_words(record: Benchmark, comparison: Comparison) -> str:
    arm, against = record.label(comparison.arm), record.label(comparison.against)
    interval = f"{comparison.difference:+.3f} ({comparison.low:+.3f} to {comparison.high:+.3f})"
    verdict = record.verdict(comparison)
    return f"{arm} against {against} in {comparison.metric}: {interval}{comparison.p_in_words}, {verdict}"


def tables(artifact: Path) -> list[ResultTable]:
    """The values of every arm, and the paired differences of arms."""
    record = Benchmark.read(artifact)
    return [_values(record), *([_differences(record)] if record.comparisons or record.other_comparisons else [])]


def _values(record: Benchmark) -> ResultTable:
    template = "with the chat template" if record.chat_template else "without a chat template"
    cut = " A limit left out rows, so these values cannot be compared with others." if record.cut else ""
    rows = [
        (
            task.key(metric),
            [
                Cell(text=_ABSENT if task.num_fewshot is None else str(task.num_fewshot)),
                Cell(text=str(task.num_rows) if task.num_rows == task.all_rows else f"{task.num_rows}/{task.all_rows}"),
                *(_value(arm, task.key(metric)) for arm in record.arms),
            ],
        )
        for task in record.tasks
        for metric in task.metrics
    ]
    arms = {arm.name: arm.label for arm in record.arms}
    return ResultTable(
        title="Tasks",
        note=f"Values of lm-evaluation-harness {record.harness} {template}; ± is the standard error.{cut}",
        columns={"examples": "examples", "rows": "rows", **arms},
        rows=rows,
        of_arms=list(arms),
    )


def _value(arm: BenchmarkArm, key: str) -> Cell:
    measured = arm.values.get(key)
    if measured is None:
        return Cell(text=_ABSENT)
    return Cell(text=f"{measured.value:.3f}", bounds="" if measured.stderr is None else f"± {measured.stderr:.3f}")


def _differences(record: Benchmark) -> ResultTable:
    rows = [
        (
            f"{comparison.metric}: {record.label(comparison.arm)} − {record.label(comparison.against)}",
            [
                Cell(text=f"{comparison.difference:+.3f}", bounds=f"{comparison.low:+.3f} to {comparison.high:+.3f}"),
                Cell(text=_ABSENT if comparison.adjusted_p is None else p_in_short(comparison.adjusted_p)),
                Cell(text=verdict, tone=_TONES.get(verdict, "open")),
            ],
        )
        for comparison in (*record.comparisons, *record.other_comparisons)
        for verdict in (record.verdict(comparison),)
    ]
    note = (
        "Differences are paired by row, with 95 % intervals (bootstrap over rows). A difference is real if the p value "
        "of a randomisation test, corrected for the number of comparisons, is below 0.05. Comparisons by the first "
        "metric of each task form one family, all others another."
    )
    columns = {"difference": "difference", "p": "p, corrected", "verdict": "verdict"}
    return ResultTable(title="Differences between arms", note=note, columns=columns, rows=rows)
