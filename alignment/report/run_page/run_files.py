"""Reads a run's files into records. A missing or torn file becomes a note; only a bad run.json stops the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment.config.evaluating import GateConfig
from alignment.core import typed_json
from alignment.core.artifacts import EVALUATION, FORGETTING, REWARD_CARD, Manifest, read_manifest
from alignment.core.errors import ArtifactError
from alignment.evaluation.paired_scores import outcomes
from alignment.records import reward_card, stages
from alignment.records import run as run_record
from alignment.records.cost import FILE as COST
from alignment.records.cost import RunCost, StageCost
from alignment.records.evaluation import FILE, SAMPLES, Evaluation, Sample
from alignment.records.run import RunRecord
from alignment.records.training import readable_rows
from alignment.records.worker import STATUS, Status
from alignment.report.kit import text
from alignment.report.kit.text import FOR_A_PAGE, shown
from alignment.report.run_page.run_records import (
    Card,
    Forgetting,
    Gate,
    Run,
    Stage,
    Tables,
    artifact_folder,
    evaluation_stages,
    steps_file,
)
from alignment.report.run_page.shown_rows import read_left_out
from alignment.stages.base import Cell, ResultTable
from alignment.stages.kind_problems import KindError
from alignment.stages.registry import produced_by, tables_of


def read_evaluation(path: Path) -> tuple[Evaluation | None, str]:
    record, note = shown(path, Evaluation)
    if record is not None and not record.arms:
        return None, f"The file {path.name} names no arms."
    if record is None:
        return None, note
    taken = Counter(arm.label for arm in record.arms)  # as the page cuts them
    arms = [replace(arm, label=arm.name) if taken[arm.label] > 1 else arm for arm in record.arms]
    return replace(record, arms=arms), note


def read_samples(rows: list[dict[str, Any]]) -> tuple[list[Sample], int]:
    """The samples that have at least one answer, cleaned for a page, and how many rows have none."""
    records = [typed_json.parts(row, Sample, FOR_A_PAGE) for row in rows]
    samples = [_cleaned_sample(record) for record in records if record is not None and record.answers]
    return samples, len(rows) - len(samples)


def _cleaned_sample(sample: Sample) -> Sample:
    messages = [
        {"role": text.name(turn.get("role", "")), "content": text.prose(turn.get("content") or "")}
        for turn in sample.messages
    ]
    return replace(sample, messages=messages, task=sample.task or "no task")


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


def read_run(run_folder: Path) -> Run:
    """Everything that the page shows of the run in ``run_folder``. Raises ArtifactError: run.json is missing or
    unreadable."""
    record = _read_record(run_folder)
    folders = {name: artifact_folder(run_folder, name, entry) for name, entry in record.stages.items()}
    stages = [_read_stage(run_folder, name, record, folders[name]) for name in record.stages]
    evaluated = _evaluated(record, folders)
    others = [n for n, entry in record.stages.items() if produced_by(entry.kind) == EVALUATION and n != evaluated]
    evaluation, evaluation_note, samples, samples_note = _read_evaluation_of(record, folders, evaluated)
    return Run(
        record=record,
        stages=stages,
        evaluation=evaluation,
        evaluation_note=evaluation_note,
        other_evaluations=f"These are the results of {evaluated}. The run also has: {', '.join(others)}."
        if evaluated and others
        else "",
        samples=samples,
        samples_note=samples_note,
        cards=_read_cards(stages, folders),
        forgetting=[
            read_forgetting(stage.name, folders[stage.name])
            for stage in stages
            if produced_by(stage.kind) == FORGETTING
        ],
        tables=[tables for stage in stages if (tables := read_tables(stage, folders[stage.name])).shown],
        gates=[gate for stage in stages for gate in read_gates(stage, folders[stage.name])],
    )


def _read_record(run_folder: Path) -> RunRecord:
    path = run_folder / run_record.FILE
    try:
        record = typed_json.read_parts(path, RunRecord, FOR_A_PAGE, remedy="start the run again to rewrite it")
    except FileNotFoundError as error:
        raise ArtifactError("there is no run here", where=str(path), remedy="give a folder runs/<run>") from error
    assert record is not None, "every field has a default"
    stages = {text.name(name): entry for name, entry in record.stages.items()}
    return replace(record, name=record.name or text.name(run_folder.name), stages=stages)


def _read_stage(run_folder: Path, name: str, record: RunRecord, folder: Path | None) -> Stage:
    notes: list[str] = []
    manifest = _read_manifest(folder, notes)
    metrics = _read_metrics(folder, notes)
    left_out = read_left_out(folder, notes)
    entry = record.stages[name]
    then = text.finite(manifest.usage.get("seconds")) if manifest else None
    return Stage(
        name=name,
        kind=entry.kind,
        state=entry.state,
        artifact=text.name(folder.name) if folder else "",
        seconds=then if entry.state == "reused" or entry.seconds is None else entry.seconds,
        attempts=entry.attempts,
        inputs=entry.references,
        config=record.settings_of(name),
        manifest=manifest,
        metrics=metrics,
        notes=notes,
        error="" if entry.complete else _error(run_folder / name / STATUS),
        planned=_planned(run_folder / name / COST),
        left_out=left_out,
    )


def _planned(file: Path) -> StageCost | None:
    cost, _ = shown(file, RunCost) if file.is_file() else (None, "")
    return cost.stages[0] if cost is not None and cost.stages and not cost.stages[0].error else None


def _read_manifest(folder: Path | None, notes: list[str]) -> Manifest | None:
    try:
        return read_manifest(folder) if folder else None
    except (ArtifactError, OSError) as error:
        notes.append(f"Its manifest cannot be read ({type(error).__name__}), so its lineage is not shown.")
        return None


def _read_metrics(folder: Path | None, notes: list[str]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; those of an interrupted stage are in its work folder."""
    path = None if folder is None else steps_file(folder)
    if path is None:
        return []
    rows, torn = readable_rows(path)
    if torn:
        lines = "1 line" if torn == 1 else f"{torn} lines"
        notes.append(f"{lines} of its metrics.jsonl cannot be read and {'is' if torn == 1 else 'are'} left out.")
    return rows


def _error(path: Path) -> str:
    status, _ = shown(path, Status)
    return "" if status is None else status.error[:4000]


def _evaluated(record: RunRecord, folders: dict[str, Path | None]) -> str:
    """The evaluation that the report stage names, or else the last one in the run that has a result; "" if there is
    none."""
    known = [(name, folder) for name in evaluation_stages(record) if (folder := folders[name]) is not None]
    return next((name for name, folder in known if (folder / "evaluation.json").is_file()), "")


def _read_evaluation_of(
    record: RunRecord, folders: dict[str, Path | None], evaluated: str
) -> tuple[Evaluation | None, str, list[Sample], str]:
    candidates = evaluation_stages(record)
    if not candidates:
        return None, "This run has no evaluate stage.", [], "Samples come from an evaluation; this run has none."
    evaluation_folder = folders.get(evaluated)
    if evaluation_folder is None:
        reason = f"The evaluation ({candidates[0]}) has no result yet."
        return None, reason, [], "Samples come from the evaluation, which has no result yet."
    evaluation, note = read_evaluation(evaluation_folder / "evaluation.json")
    if not (evaluation_folder / SAMPLES).is_file():
        return evaluation, note, [], "The evaluation has no samples.jsonl."
    rows, torn = readable_rows(evaluation_folder / SAMPLES)
    samples, left_out = read_samples(rows)
    lost = torn + left_out
    return evaluation, note, samples, f"{lost} rows of samples.jsonl cannot be read." if lost else ""


def _read_cards(stages: list[Stage], folders: dict[str, Path | None]) -> list[Card]:
    cards = []
    for stage in stages:
        folder = folders[stage.name]
        if produced_by(stage.kind) != REWARD_CARD or folder is None or not (folder / reward_card.FILE).exists():
            continue
        record, note = shown(folder / reward_card.FILE, reward_card.RewardCard)
        if record is None:
            stage.notes.append(note)
        else:
            cards.append(Card(stage=stage.name, record=record))
    return cards
