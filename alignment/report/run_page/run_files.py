"""Reads a run's files into records. A missing or torn file becomes a note; only a bad run.json stops the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment.core import typed_json
from alignment.core.artifacts import EVALUATION, FORGETTING, REWARD_CARD, Manifest, read_manifest
from alignment.core.errors import ArtifactError
from alignment.records import reward_card
from alignment.records.cost import FILE as COST
from alignment.records.cost import RunCost, StageCost
from alignment.records.evaluation import SAMPLES, Evaluation
from alignment.records.run import FILE, RunRecord
from alignment.records.training import readable_rows
from alignment.records.worker import STATUS, Status
from alignment.report.kit import text
from alignment.report.kit.text import FOR_A_PAGE, shown
from alignment.report.run_page.run_records import (
    Card,
    Run,
    Sample,
    Stage,
    artifact_folder,
    evaluation_stages,
    steps_file,
)
from alignment.report.run_page.sections import read_evaluation, read_forgetting, read_gates, read_samples, read_tables
from alignment.report.run_page.shown_rows import read_left_out
from alignment.stages.registry import produced_by


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
    path = run_folder / FILE
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
    samples, left_out = read_samples(rows, evaluation.primary_metric if evaluation else None)
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
