"""An evaluation and its answers, as far as evaluation.json and the rows of samples.jsonl can be read."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment.core import typed_json
from alignment.records import evaluation
from alignment.records.evaluation import Evaluation, Metric, SampleAnswer
from alignment.report.kit import text
from alignment.report.kit.record_files import FOR_A_PAGE, shown
from alignment.report.run_page.run_records import Answer, Sample


def read_evaluation(path: Path) -> tuple[Evaluation | None, str]:
    """The evaluation, or None and the reason in words."""
    record, note = shown(path, Evaluation)
    if record is not None and not record.arms:
        return None, f"The file {path.name} names no arms."
    return None if record is None else _with_labels_of_their_own(record), note


def _with_labels_of_their_own(evaluation: Evaluation) -> Evaluation:
    """The evaluation, with an arm's whole name where its label, as the page cuts it, is that of another arm too."""
    taken = Counter(arm.label for arm in evaluation.arms)
    arms = [replace(arm, label=arm.name) if taken[arm.label] > 1 else arm for arm in evaluation.arms]
    return replace(evaluation, arms=arms)


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
