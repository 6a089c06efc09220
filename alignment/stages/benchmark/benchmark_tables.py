"""A result of benchmarks as lines for the terminal and as tables for pages and model cards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignment.records.benchmark import FILE, Benchmark, BenchmarkArm, BenchmarkTask, Measurement, TaskMetric
from alignment.records.evaluation import BETTER, NO_DIFFERENCE, WORSE, Comparison, p_in_short
from alignment.stages.base import Cell, ResultTable

BASE = "base"
"""The arm that others are compared with first."""
_TONES = {BETTER: "good", WORSE: "bad"}
_ABSENT = "–"
_MOST_NAMED = 3
"""How many tasks a sentence names."""


def lines(artifact: Path) -> list[str]:
    """A line for each metric of each task with every arm's value, one for each comparison by a task's first metric, and
    the result in a sentence; none without ``benchmark.json``."""
    if not (artifact / FILE).is_file():
        return []
    record = Benchmark.read(artifact)
    return [
        *(_line(record, task, metric) for task in record.tasks for metric in task.metrics),
        *(_in_words(record, comparison) for comparison in record.comparisons),
        _lead(record),
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


def _lead(record: Benchmark) -> str:
    """Which arms differ, from ``base`` if it is among them, by the tasks' first metrics; without comparisons, the first
    values of each arm, those of groups of tasks before others."""
    of_base = [comparison for comparison in record.comparisons if comparison.against == BASE]
    by_pair: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in of_base or record.comparisons:
        by_pair.setdefault((comparison.arm, comparison.against), []).append(comparison)
    if by_pair:
        return " ".join(_pair_in_words(record, *pair, comparisons) for pair, comparisons in by_pair.items())
    keys = [
        task.key(metric) for task in sorted(record.tasks, key=lambda task: not task.group) for metric in task.metrics
    ]
    values = {
        arm.label: [f"{key} {_in_short(arm.values[key])}" for key in keys if key in arm.values] for arm in record.arms
    }
    return " ".join(f"{label}: {_listed(named)}." for label, named in values.items() if named)


def _pair_in_words(record: Benchmark, arm: str, against: str, comparisons: Sequence[Comparison]) -> str:
    """``sft is better than base in capitals/acc (+0.200); no real difference in 2 other tasks.``"""
    real = [
        f"{verdict} than {record.label(against)} in {_listed(named)}"
        for verdict in (BETTER, WORSE)
        if (named := [f"{c.metric} ({c.difference:+.3f})" for c in comparisons if record.verdict(c) == verdict])
    ]
    unclear = [comparison.metric for comparison in comparisons if not comparison.real]
    if not real:
        return f"{record.label(arm)} and {record.label(against)}: {NO_DIFFERENCE} in {_listed(unclear)}."
    rest = f"; {NO_DIFFERENCE} in {_listed(unclear)}" if unclear else ""
    return f"{record.label(arm)} is {' and '.join(real)}{rest}."


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


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
        lead=_lead(record),
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
