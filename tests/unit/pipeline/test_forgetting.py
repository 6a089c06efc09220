"""The gate behind a run: which arms may be named, and what is said of one that forgot."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from alignment.core.errors import ConfigError, DataError, GateNotMet
from alignment.data.mix import mixed
from alignment.pipeline.execute import gates
from alignment.pipeline.execute.summary import show_forgetting
from alignment.pipeline.plan.plan import Plan, make_plan
from alignment.records.forgetting import ArmForgetting, Forgetting, Limits
from alignment.records.interval import Interval
from alignment.stages.registry import kind_named
from tests.unit.pipeline.conftest import leave_artifact

RECIPE = """
defaults:
  - base
  - stage@stages.sft: sft
  - stage@stages.reward: reward
  - stage@stages.ppo: ppo
  - stage@stages.forgetting: forgetting
  - _self_
summary: a gate behind three stages
"""

Gate = Callable[..., Plan]


@pytest.fixture
def gate(tmp_path: Path, overrides: list[str]) -> Gate:
    """Plans the recipe above with more overrides."""
    recipe = tmp_path / "gate.yaml"
    recipe.write_text(RECIPE)
    common_overrides = [
        override for override in overrides if not override.startswith(("stages.dpo", "stages.evaluate"))
    ]
    return lambda *more: make_plan(str(recipe), [*common_overrides, *more])


def _arms(*names: str) -> str:
    return f"stages.forgetting.arms=[{','.join(repr(name) for name in names)}]"


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ([], "stages.forgetting.arms: is empty; list the policies to measure, for example [stage:sft]"),
        (["base"], "stages.forgetting.arms[0]: 'base' was not trained; remove it, the base model is measured anyway"),
        (["stage:sft", "base+prompt"], "stages.forgetting.arms[1]: 'base+prompt' was not trained; "),
        (["stage:reward"], "stages.forgetting.arms[0]: 'stage:reward' is a reward model; this slot takes a policy. "),
        (["stage:sft", "stage:sft"], "stages.forgetting.arms[1]: 'stage:sft' is listed twice"),
        (["stage:sfd"], "stages.forgetting.arms[0]: no stage 'sfd' in this run; did you mean 'sft'?"),
    ],
)
def test_arms_are_policies_that_were_trained(gate: Gate, arms: Sequence[str], message: str) -> None:
    overrides = [_arms(*arms)] if arms else []
    with pytest.raises(ConfigError) as caught:
        gate(*overrides)
    assert message in str(caught.value)


def test_questions_are_checked_while_planning_and_part_of_the_result(gate: Gate, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "2 + 2?", "choices": ["3", "4"], "answer": "5"}\n')
    overrides = (_arms("stage:sft"), f"stages.forgetting.questions.source=path:{file}")
    with pytest.raises(DataError, match=r"mine\.jsonl:1: 'answer' is '5', which is not one of the choices: '3', '4'"):
        gate(*overrides)
    file.write_text('{"question": "2 + 2?", "choices": ["3", "4"], "answer": "4"}\n')
    before = gate(*overrides).stages[-1]
    assert before.extra_data["questions"] == file
    file.write_text('{"question": "2 + 2?", "choices": ["3", "4"], "answer": 0}\n')
    assert gate(*overrides).stages[-1].fingerprint != before.fingerprint


def test_no_texts_are_refused(gate: Gate, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("\n")
    with pytest.raises(DataError, match="contains no rows"):
        gate(_arms("stage:sft"), f"stages.forgetting.data.source=path:{file}")


@pytest.mark.parametrize("setting", ["max_perplexity_rise=-0.1", "max_ability_drop=1.1"])
def test_limits_are_shares(gate: Gate, setting: str) -> None:
    with pytest.raises(ConfigError, match=setting.partition("=")[0]):
        gate(_arms("stage:sft"), f"stages.forgetting.{setting}")


@pytest.mark.parametrize(("judged", "verdict"), [(True, "sft passed: "), (False, "sft not judged: ")])
def test_without_limits_the_terminal_does_not_say_passed(
    judged: bool, verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ArmForgetting(name="base", perplexity=28.6, ability=0.6)
    arm = replace(base, name="stage:sft", label="sft", perplexity=497.0, rise=Interval(mean=16.39), passed=True)
    show_forgetting(Console(), "forgetting", Forgetting(judged=judged, arms=[base, arm]))
    printed = capsys.readouterr().out
    assert verdict in printed
    assert ("passed" in printed) is judged


def _left(plan: Plan, *forgetful: str) -> None:
    """A result in which these arms are over a limit."""
    stage = plan.stages[-1]
    arms = [
        {"name": name, "label": name.removeprefix("stage:"), "passed": name not in forgetful, "reasons": ["too dear"]}
        for name in ("base", *stage.arms)
    ]
    leave_artifact(stage)
    forgetting = {"arms": arms, "passed": not forgetful}
    (stage.artifact / "forgetting.json").write_text(json.dumps(forgetting))


def test_a_run_ends_with_the_arms_that_forgot_and_what_helps_each(gate: Gate) -> None:
    arms = _arms("stage:sft", "stage:ppo")
    plan = gate(arms)
    _left(plan, "stage:ppo", "stage:sft")
    with pytest.raises(GateNotMet) as caught:
        gates.refuse(plan.stages, plan.config.stages)
    assert caught.value.exit_code == 10
    lines = str(caught.value).splitlines()
    assert lines[0] == "stages.forgetting: sft forgot too much: too dear"
    assert lines[1] == "  stages.forgetting: ppo forgot too much: too dear"
    assert "stages.sft.data.mix=[{source: 'bundled:general/conversations'}]" in lines[2]
    assert "stages.ppo.ptx.coefficient" in lines[3]
    assert lines[4] == "  → stages.forgetting.max_perplexity_rise and max_ability_drop set the limits"


def test_arms_within_the_limits_are_named_with_their_figures_and_the_limits(gate: Gate) -> None:
    plan = gate(_arms("stage:sft", "stage:ppo"))
    stage = plan.stages[-1]
    leave_artifact(stage)
    base = ArmForgetting(name="base", passed=True)
    rise, drop = Interval(mean=0.02, low=0.015, high=0.025), Interval(mean=-0.01, low=-0.03, high=0.02)
    arm = replace(base, name="stage:sft", label="sft", rise=rise, drop=drop)
    forgetful = replace(arm, name="stage:ppo", label="ppo", passed=False, reasons=["too dear"])
    record = Forgetting(limits=Limits(perplexity_rise=0.2, ability_drop=0.05), arms=[base, arm, forgetful])
    record.write(stage.artifact)
    rise_in_words = "perplexity of general text +2.0% (+1.5% to +2.5%), required: a rise of at most 20.0%"
    drop_in_words = "questions answered right +1.0% (-2.0% to +3.0%), required: a drop of at most 5.0%"
    within = "stages.forgetting: sft is within the limits: "
    assert gates.met(plan.stages) == [f"{within}{rise_in_words}; {drop_in_words}"]
    replace(record, limits=Limits(perplexity_rise=0.2)).write(stage.artifact)
    assert gates.met(plan.stages) == [f"{within}{rise_in_words}"]
    replace(record, limits=Limits(), judged=False).write(stage.artifact)
    assert gates.met(plan.stages) == []


def test_the_remedy_that_is_named_can_be_carried_out_on_any_number_of_rows(gate: Gate) -> None:
    plan = gate(_arms("stage:sft"))
    _left(plan, "stage:sft")
    with pytest.raises(GateNotMet) as caught:
        gates.refuse(plan.stages, plan.config.stages)
    remedy = caught.value.remedy.split("replay: ")[1].split(" adds")[0]
    (general,) = gate(_arms("stage:sft"), remedy).config.stages["sft"].data.mix  # type: ignore[union-attr]
    for own_rows in (10, 2_000):
        rows = mixed(own_rows, [(general, 124)], torch.Generator(), where="stages.sft.data")
        assert sorted(rows) == list(range(own_rows + 124))


def test_the_remedy_of_preferences_does_not_name_a_setting_that_some_losses_refuse() -> None:
    for kind in ("dpo", "kto"):
        remedy = kind_named(kind).outcome.against_forgetting("it")
        assert remedy.startswith(
            "lower stages.it.optim.lr or train fewer epochs; raise stages.it.beta, if its loss has"
        )


def test_nothing_is_said_where_all_passed_or_nothing_was_measured(gate: Gate) -> None:
    plan = gate(_arms("stage:sft"))
    gates.refuse(plan.stages, plan.config.stages)
    _left(plan)
    gates.refuse(plan.stages, plan.config.stages)
    assert gates.not_met(plan.stages) == []
