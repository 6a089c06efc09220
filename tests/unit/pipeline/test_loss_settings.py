"""Settings of preference losses: what a loss does not use, lacks or cannot combine is refused by the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignment.core.errors import ConfigError, DataError
from alignment.stages.dpo.config import DpoConfig, DpoLoss
from alignment.stages.dpo.kind import KIND
from alignment.stages.dpo.loss_settings import loss_faults
from tests.unit.pipeline.conftest import ROWS, TURN, MakePlan

NOT_ORPO = "sigmoid, sigmoid_norm, hinge, ipo, robust, apo_zero, apo_down, simpo"
SIMPO: dict[str, Any] = {"loss": DpoLoss.simpo, "target_margin": 1.0}
CHOOSE = "remove the setting, or choose a loss that uses it:"


def unused(name: str, value: str, loss: str, takers: str) -> list[str]:
    return [f"stages.dpo.{name}: {value} has no effect: the loss {loss} does not use it; {CHOOSE} {takers}"]


@pytest.mark.parametrize(
    ("settings", "faults"),
    [
        ({}, []),
        ({"label_smoothing": 0.1}, []),
        ({"loss": DpoLoss.sigmoid_norm, "label_smoothing": 0.1}, []),
        ({"loss": DpoLoss.robust, "label_smoothing": 0.1, "nll_weight": 1.0, "precompute_reference": True}, []),
        ({"margin": 0.5, "nll_weight": 1.0}, []),
        ({**SIMPO, "beta": 2.0, "nll_weight": 1.0}, []),
        ({"loss": DpoLoss.simpo, "target_margin": 0.0}, []),
        ({"loss": DpoLoss.orpo, "odds_weight": 0.2}, []),
        (
            {"loss": DpoLoss.hinge, "label_smoothing": 0.1},
            unused("label_smoothing", "0.1", "hinge", "sigmoid, sigmoid_norm, robust"),
        ),
        (
            {**SIMPO, "label_smoothing": 0.1},
            unused("label_smoothing", "0.1", "simpo", "sigmoid, sigmoid_norm, robust"),
        ),
        ({"loss": DpoLoss.ipo, "margin": 1.0}, unused("margin", "1.0", "ipo", "sigmoid")),
        ({"target_margin": 0.0}, unused("target_margin", "0.0", "sigmoid", "simpo")),
        ({"odds_weight": 0.2}, unused("odds_weight", "0.2", "sigmoid", "orpo")),
        ({"loss": DpoLoss.orpo, "beta": 0.2}, unused("beta", "0.2", "orpo", NOT_ORPO)),
        (
            {"loss": DpoLoss.orpo, "nll_weight": 1.0},
            [f"stages.dpo.nll_weight: 1.0 has no effect: orpo already has this term; {CHOOSE} {NOT_ORPO}"],
        ),
        (
            {"loss": DpoLoss.simpo},
            [
                "stages.dpo.target_margin: is missing, and simpo needs it; Meng et al. (2024) use 0.3 to 1.6 with a "
                "beta of 2 to 2.5, and 0 means no margin"
            ],
        ),
        (
            {"loss": DpoLoss.robust},
            [
                "stages.dpo.label_smoothing: with 0, robust is the same as sigmoid; set the share of flipped "
                "labels, such as 0.1, or loss=sigmoid"
            ],
        ),
        (
            {"margin": 1.0, "label_smoothing": 0.1},
            [
                "stages.dpo.margin: 1 cannot be combined with label_smoothing=0.1: the margin of a flipped pair is "
                "unknown; set one of them to 0"
            ],
        ),
    ],
)
def test_settings_that_a_loss_cannot_use_are_named_exactly(settings: dict[str, Any], faults: list[str]) -> None:
    assert [str(fault) for fault in loss_faults(DpoConfig(**settings), "stages.dpo")] == faults


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.dpo.loss=simpo", "stages.dpo.target_margin: is missing, and simpo needs it"),
        ("stages.dpo.label_smoothing=0.5", "stages.dpo.label_smoothing: 0.5"),
        ("stages.dpo.nll_weight=-1", "stages.dpo.nll_weight: -1"),
        ("stages.dpo.loss=simp", "simpo"),
    ],
)
def test_a_plan_refuses_them(plan: MakePlan, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(override)
    assert words in str(caught.value)


def test_a_plan_takes_losses_without_a_reference_from_the_base(plan: MakePlan) -> None:
    plan("stages.dpo={loss: orpo, init: base, beta: 0.1}")
    plan("stages.dpo={loss: simpo, target_margin: 1.0, beta: 2.0}")


# ---- margins --------------------------------------------------------------------------------------------------------


def scored(folder: Path, *scores: dict[str, Any]) -> str:
    file = folder / "scored.jsonl"
    rows = [
        {**ROWS["preferences"], "messages": [{**TURN, "content": f"When is {day}?"}], "score_a": 2, "score_b": 1.5}
        for day in range(30)
    ]
    for row, changes in zip(rows, scores, strict=False):
        row.update(changes)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"path:{file}"


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_a_margin_needs_rows_with_scores_which_columns_may_name(plan: MakePlan, tmp_path: Path, stage: str) -> None:
    with pytest.raises(DataError) as caught:
        plan(f"stages.{stage}.margin=1")
    assert "preferences.jsonl:1: the row has no numbers in 'chosen_score' and 'rejected_score', which 'margin'" in str(
        caught.value
    )
    source = f"stages.{stage}.data={{source: '{scored(tmp_path)}'"
    columns = "columns: {chosen_score: score_a, rejected_score: score_b}}"
    plan(f"stages.{stage}.margin=1", f"{source}, {columns}")
    with pytest.raises(DataError, match="no numbers"):
        plan(f"stages.{stage}.margin=1", f"{source}, columns: {{chosen_score: score_a}}}}")
    with pytest.raises(DataError, match="more than 5% of 30 rows are faulty; 30 faulty rows"):
        plan(f"stages.{stage}.margin=1", f"{source}, on_error: skip}}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score_b": 3}, "scored.jsonl:2: the chosen answer scores 2, less than the rejected one with 3"),
        ({"score_b": None}, "scored.jsonl:2: the row has no numbers"),
        ({"score_b": "high"}, "scored.jsonl:2: the row has no numbers"),
        ({"score_b": True}, "scored.jsonl:2: the row has no numbers"),
        ({"score_b": float("nan")}, "scored.jsonl:2: 'rejected_score' must be a finite number"),
    ],
)
def test_a_row_whose_scores_are_of_no_use_is_named(
    plan: MakePlan, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    columns = "columns: {chosen_score: score_a, rejected_score: score_b}}"
    with pytest.raises(DataError) as caught:
        plan("stages.dpo.margin=1", f"stages.dpo.data={{source: '{scored(tmp_path, {}, changes)}', {columns}")
    assert words in str(caught.value)
    plan(f"stages.dpo.data={{source: '{scored(tmp_path, {}, changes)}', {columns}")
    skipped = (
        f"stages.dpo.data={{on_error: skip, max_skipped: 0.1, source: '{scored(tmp_path, {}, changes)}', {columns}"
    )
    stage = next(stage for stage in plan("stages.dpo.margin=1", skipped).stages if stage.name == "dpo")
    assert stage.seen["data"].rows == 29, "the stage leaves it out"


# ---- charts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "guide"),
    [
        ({}, 0.6931471805599453),
        ({"loss": "robust", "label_smoothing": 0.1}, 0.6931471805599453),
        ({"label_smoothing": 0.1}, 0.6931471805599453),
        ({"loss": "sigmoid_norm"}, 0.6931471805599453),
        ({"nll_weight": 1.0}, None),
        ({"margin": 1.0}, None),
        ({"loss": "simpo"}, None),
        ({"loss": "orpo"}, None),
        ({"loss": "apo_zero"}, None),
    ],
)
def test_the_loss_has_a_guide_where_it_starts_at_a_constant(settings: dict[str, Any], guide: float | None) -> None:
    loss, _, margin, logprobs = KIND.curves(settings)
    assert loss.guide == guide
    assert margin.unit == ("log odds" if settings.get("loss") == "orpo" else "implicit reward") + ", chosen − rejected"
    assert logprobs.keys == ("logps/chosen", "logps/rejected")


@pytest.mark.parametrize(
    ("chosen", "rejected", "doubted"),
    [(-0.7, -0.7, True), (-0.7, -0.69, False), (-0.69, -0.7, False), (1.0, -9.0, False), (-9.0, 1.0, False)],
)
def test_a_fall_of_both_answers_is_doubted_once_they_are_half_as_likely(
    chosen: float, rejected: float, doubted: bool
) -> None:
    metrics = {"logps/chosen_change": chosen, "logps/rejected_change": rejected}
    assert bool(KIND.outcome.doubts(metrics)) is doubted
    assert not KIND.outcome.doubts({"loss": 1.0}), "a result of an earlier version"
