"""Sections of the report: evaluation, forgetting, gates and tables of stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment.config.evaluating import GateConfig
from alignment.core import typed_json
from alignment.core.errors import ArtifactError
from alignment.evaluation.gate_outcomes import outcomes
from alignment.records import evaluation, stages
from alignment.records.evaluation import FILE, Evaluation, Metric, SampleAnswer
from alignment.report.kit import text
from alignment.report.kit.text import FOR_A_PAGE, shown
from alignment.report.run_page.run_records import Answer, Forgetting, Gate, Sample, Stage, Tables
from alignment.stages.base import Cell, ResultTable
from alignment.stages.kind_problems import KindError
from alignment.stages.registry import tables_of


def read_evaluation(path: Path) -> tuple[Evaluation | None, str]:
    record, note = shown(path, Evaluation)
    if record is not None and not record.arms:
        return None, f"The file {path.name} names no arms."
    if record is None:
        return None, note
    taken = Counter(arm.label for arm in record.arms)  # as the page cuts them
    arms = [replace(arm, label=arm.name) if taken[arm.label] > 1 else arm for arm in record.arms]
    return replace(record, arms=arms), note


def read_samples(rows: list[dict[str, Any]], primary: Metric | None) -> tuple[list[Sample], int]:
    """The samples that have at least one answer, and how many rows have none."""
    records = [typed_json.parts(row, evaluation.Sample, FOR_A_PAGE) for row in rows]
    samples = [_sample(record, primary) for record in records if record is not None and record.answers]
    return samples, len(rows) - len(samples)


def _sample(record: evaluation.Sample, primary: Metric | None) -> Sample:
    return Sample(
        id=record.id,
        prompt=record.prompt,
        task=record.task or "no task",
        messages=[(text.name(turn.get("role", "")), text.prose(turn.get("content") or "")) for turn in record.messages],
        reference=record.reference,
        answers=[_answer(arm, answer, primary) for arm, answer in record.answers.items()],
        later_turns=tuple(record.later_turns),
        later_references=tuple(record.later_references),
    )


def _answer(arm: str, answer: SampleAnswer, primary: Metric | None) -> Answer:
    score = None if primary is None else answer.scores.get(primary.name)
    less_is_better = primary is not None and not primary.higher_is_better
    return Answer(
        arm=arm,
        text=answer.text,
        scores=answer.scores,
        merit=-score if score is not None and less_is_better else score,
        later=tuple(turn.text for turn in answer.turns[1:]),
    )


def read_forgetting(stage: str, folder: Path | None) -> Forgetting:
    if folder is None or not (folder / stages.FORGETTING_FILE).is_file():
        return Forgetting(stage=stage, note=f"{stage} has no result yet.")
    record, note = shown(folder / stages.FORGETTING_FILE, stages.Forgetting)
    if record is not None and not record.arms:
        note = f"The file {stages.FORGETTING_FILE} names no arms."
    return Forgetting(stage=stage, record=record, note=note)


def read_gates(stage: Stage, folder: Path | None) -> list[Gate]:
    """The gates of a stage that has a result; those that cannot be read are left out."""
    gates = list(_readable(stage.config.get("gate")))
    if not gates or folder is None or not (folder / FILE).is_file():
        return []
    evaluation, _ = read_evaluation(folder / FILE)
    if evaluation is None:
        return []
    try:
        judged = outcomes(gates, evaluation, folder)
    except (ArtifactError, OSError, ValueError):  # the page says that the samples cannot be read
        return []
    return [Gate(met=outcome.met, sentence=text.prose(outcome.in_words())) for outcome in judged]


def _readable(listed: Any) -> Iterator[GateConfig]:
    for gate in listed if isinstance(listed, list) else ():
        if not isinstance(gate, Mapping):
            continue
        arm, against, metric = (gate.get(name) for name in ("arm", "against", "metric"))
        required = text.finite(gate.get("min_difference"))
        if isinstance(arm, str) and isinstance(against, str) and required is not None:
            name = metric if isinstance(metric, str) else None
            yield GateConfig(arm=arm, against=against, metric=name, min_difference=required)


def read_tables(stage: Stage, folder: Path | None) -> Tables:
    """The stage's tables, cleaned for a page, or a note that says why there are none."""
    if folder is None:
        return Tables(stage=stage.name)
    try:
        return Tables(stage=stage.name, tables=[_cleaned(table) for table in tables_of(stage.kind, folder)])
    except KindError as error:
        return Tables(stage=stage.name, note=text.prose(f"The tables of {stage.name} cannot be shown: {error}"))
    except FileNotFoundError:
        return Tables(stage=stage.name, note=f"{stage.name} has no result yet.")
    except ArtifactError:
        return Tables(stage=stage.name, note=f"The result of {stage.name} cannot be read.")


def _cleaned(table: ResultTable) -> ResultTable:
    return replace(
        table,
        title=text.name(table.title),
        note=text.prose(table.note),
        lead=text.prose(table.lead),
        columns={key: text.name(heading) for key, heading in table.columns.items()},
        rows=[(text.name(label, limit=120), [_cell(cell) for cell in cells]) for label, cells in table.rows],
    )


def _cell(cell: Cell) -> Cell:
    return replace(cell, text=text.name(cell.text), bounds=text.name(cell.bounds))


def side_by_side(runs: Sequence[Sequence[Tables]]) -> list[tuple[str, ResultTable]]:
    """One table for each stage and title that runs share, with the arms of each run as columns, by stage. Column keys
    are ``(number of the run)/(key)``; a run without a row gets empty cells."""
    titles = dict.fromkeys(
        (of_stage.stage, table.title) for run in runs for of_stage in run for table in of_stage.tables if table.of_arms
    )
    return [(stage, _joined([_table(run, stage, title) for run in runs])) for stage, title in titles]


def _table(run: Sequence[Tables], stage: str, title: str) -> ResultTable | None:
    tables = (table for of_stage in run if of_stage.stage == stage for table in of_stage.tables)
    return next((table for table in tables if table.title == title), None)


def _joined(tables: Sequence[ResultTable | None]) -> ResultTable:
    present = [table for table in tables if table is not None]
    labels = dict.fromkeys(label for table in present for label, _ in table.rows)
    columns = {
        f"{number}/{key}": heading
        for number, table in enumerate(tables)
        if table is not None
        for key, heading in table.columns.items()
        if key in table.of_arms
    }
    rows = [(label, [cell for table in present for cell in _cells(table, label)]) for label in labels]
    return replace(present[0], columns=columns, rows=rows, of_arms=list(columns))


def _cells(table: ResultTable, label: str) -> list[Cell]:
    cells = next((cells for name, cells in table.rows if name == label), [Cell(text="–")] * len(table.columns))
    return [cell for key, cell in zip(table.columns, cells, strict=True) if key in table.of_arms]
