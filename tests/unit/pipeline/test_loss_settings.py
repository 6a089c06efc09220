"""Settings of preference losses: what a loss does not use, lacks or cannot combine is refused by the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignment.core.errors import DataError
from alignment.stages.dpo.kind import KIND, DpoConfig, DpoLoss, loss_faults
from tests.unit.pipeline.conftest import ROWS, TURN, MakePlan, stage_of, write_rows

SIMPO: dict[str, Any] = {"loss": DpoLoss.simpo, "target_margin": 1.0}
ROBUST, ORPO = {"loss": DpoLoss.robust}, {"loss": DpoLoss.orpo}
NOT_ORPO = "sigmoid, sigmoid_norm, hinge, ipo, robust, apo_zero, apo_down, simpo"
SMOOTHING = ("label_smoothing", "sigmoid, sigmoid_norm, robust")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({**ROBUST, "label_smoothing": 0.1, "nll_weight": 1.0, "precompute_reference": True}, None),
        ({**SIMPO, "beta": 2.0, "nll_weight": 1.0}, None),
        ({**ORPO, "odds_weight": 0.2}, None),
        ({"loss": DpoLoss.hinge, "label_smoothing": 0.1}, SMOOTHING),
        ({"loss": DpoLoss.ipo, "margin": 1.0}, ("margin", "uses it: sigmoid")),
        ({"target_margin": 0.0}, ("target_margin", "uses it: simpo")),
        ({**ORPO, "beta": 0.2}, ("beta", f"uses it: {NOT_ORPO}")),
        ({**ORPO, "nll_weight": 1.0}, ("nll_weight", "already has this term")),
        ({"loss": DpoLoss.simpo}, ("target_margin", "0 means no margin")),
        (ROBUST, ("label_smoothing", "loss=sigmoid")),
        ({"margin": 1.0, "label_smoothing": 0.1}, ("margin", "label_smoothing=0.1")),
    ],
)
def test_settings_that_a_loss_cannot_use_are_named_exactly(
    settings: dict[str, Any], expected: tuple[str, str] | None
) -> None:
    problems = list(loss_faults(DpoConfig(**settings), "stages.dpo"))
    assert [fault.where for fault in problems] == ([] if expected is None else [f"stages.dpo.{expected[0]}"])
    assert all(expected is not None and expected[1] in fault.message for fault in problems)


def scored(folder: Path, *scores: dict[str, Any]) -> str:
    rows = [
        {**ROWS["preferences"], "messages": [{**TURN, "content": f"When is {day}?"}], "score_a": 2, "score_b": 1.5}
        for day in range(30)
    ]
    for row, changes in zip(rows, scores, strict=False):
        row.update(changes)
    return f"path:{write_rows(folder / 'scored.jsonl', *rows)}"


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_a_margin_needs_rows_with_scores_which_columns_may_name(plan: MakePlan, tmp_path: Path, stage: str) -> None:
    margin, source = f"stages.{stage}.margin=1", f"stages.{stage}.data={{source: '{scored(tmp_path)}'"
    with pytest.raises(DataError, match=r"preferences\.jsonl:1: .*'chosen_score' and 'rejected_score'"):
        plan(margin)
    plan(margin, f"{source}, columns: {{chosen_score: score_a, rejected_score: score_b}}}}")
    with pytest.raises(DataError, match="no numbers"):
        plan(margin, f"{source}, columns: {{chosen_score: score_a}}}}")
    with pytest.raises(DataError, match="more than 5% of 30 rows are faulty; 30 faulty rows"):
        plan(margin, f"{source}, on_error: skip}}")


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (3, "the chosen answer scores 2, less than the rejected one with 3"),
        (None, "the row has no numbers"),
        (float("nan"), "'rejected_score' must be a finite number"),
    ],
)
def test_a_row_whose_scores_are_of_no_use_is_named(plan: MakePlan, tmp_path: Path, score: object, words: str) -> None:
    columns = "columns: {chosen_score: score_a, rejected_score: score_b}}"
    data = f"source: '{scored(tmp_path, {}, {'score_b': score})}', {columns}"
    with pytest.raises(DataError) as caught:
        plan("stages.dpo.margin=1", f"stages.dpo.data={{{data}")
    assert f"scored.jsonl:2: {words}" in str(caught.value)
    plan(f"stages.dpo.data={{{data}")
    skipping = plan("stages.dpo.margin=1", f"stages.dpo.data={{on_error: skip, max_skipped: 0.1, {data}")
    assert stage_of(skipping, "dpo").seen["data"].rows == 29, "the stage leaves it out"


@pytest.mark.parametrize(
    ("settings", "guide"),
    [
        ({}, 0.6931471805599453),
        ({"loss": "robust", "label_smoothing": 0.1}, 0.6931471805599453),
        *((settings, None) for settings in ({"nll_weight": 1.0}, {"margin": 1.0}, {"loss": "orpo"})),
    ],
)
def test_the_loss_has_a_guide_where_it_starts_at_a_constant(settings: dict[str, Any], guide: float | None) -> None:
    loss, _, margin, logprobs = KIND.display.curves(settings)
    assert loss.guide == guide
    assert margin.unit == ("log odds" if settings.get("loss") == "orpo" else "implicit reward") + ", chosen − rejected"
    assert logprobs.keys == ("logps/chosen", "logps/rejected")


@pytest.mark.parametrize(
    ("chosen", "rejected", "doubted"), [(-0.7, -0.7, True), (-0.7, -0.69, False), (-9.0, 1.0, False)]
)
def test_a_fall_of_both_answers_by_half_is_doubted(chosen: float, rejected: float, doubted: bool) -> None:
    metrics = {"logps/chosen_change": chosen, "logps/rejected_change": rejected}
    assert bool(KIND.display.doubts(metrics)) is doubted
    assert not KIND.display.doubts({"loss": 1.0}), "a result of an earlier version"
