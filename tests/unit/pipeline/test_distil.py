"""What a plan refuses of a stage in which a student learns from a teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment import cli
from alignment.core.errors import ConfigError
from alignment.pipeline.backends.feasibility import refuse_sizes
from alignment.pipeline.plan.plan import Plan, make_plan
from tests.sampled import asked

RECIPE = """
defaults: [base, stage@stages.sft: sft, stage@stages.draft: draft, stage@stages.small: distil, _self_]
summary: a policy, its draft and a smaller student
stages:
  sft: {data: {source: "path:ROWS"}}
  draft: {init: "stage:sft", teacher: "stage:sft", data: {source: "path:PROMPTS"}}
  small: {init: "stage:draft", teacher: "stage:sft", data: {source: "path:PROMPTS"}}
"""
MakePlan = Callable[..., Plan]


@pytest.fixture
def plan(tmp_path: Path, overrides: list[str]) -> MakePlan:
    """Plans with more overrides; the base has 12 layers."""
    prompts, rows = tmp_path / "prompts.jsonl", tmp_path / "rows.jsonl"
    prompts.write_text("".join(json.dumps(asked(number)) + "\n" for number in range(12)))
    answer = {"role": "assistant", "content": "In the hall."}
    rows.write_text("".join(json.dumps({"messages": [*asked(n)["messages"], answer]}) + "\n" for n in range(12)))
    (tmp_path / "model" / "config.json").write_text(json.dumps({"num_hidden_layers": 12}))
    recipe = tmp_path / "drafts.yaml"
    recipe.write_text(RECIPE.replace("PROMPTS", str(prompts)).replace("ROWS", str(rows)))
    return lambda *more: make_plan(str(recipe), [*overrides[:2], *more])


def refusal(plan: MakePlan, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        refuse_sizes(plan(*overrides))
    return str(caught.value)


def test_the_teacher_s_content_counts_and_its_name_does_not(plan: MakePlan) -> None:
    def fingerprints(*overrides: str) -> dict[str, str]:
        return {stage.name: stage.fingerprint for stage in plan(*overrides).stages}

    before = fingerprints()
    assert list(before) == ["sft", "draft", "small"]
    other = fingerprints("stages.small.teacher=base")
    assert [name for name in before if other[name] != before[name]] == ["small"]
    longer = fingerprints("stages.sft.optim.epochs=2")
    assert all(longer[name] != before[name] for name in before)


def test_a_choice_of_its_own_takes_the_first_layers_of_a_policy_in_full(plan: MakePlan) -> None:
    config: Any = plan().config.stages["draft"]
    assert (config.kind, config.layers, config.adapter.kind.value, config.timed_prompts) == ("distil", 8, "full", 8)
    assert config.method.value == "tokens"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["stages.draft.layers=null"],
            "stages.draft.init: 'stage:sft' is the teacher itself, so there is nothing to learn",
        ),
        (
            ["stages.draft.method=sequence", "stages.draft.loss_temperature=2"],
            "stages.draft.loss_temperature: 2 has no effect; only method 'tokens' uses it; leave it at 1",
        ),
        (
            ["adapter@stages.draft.adapter=prefix"],
            "stages.draft.timed_prompts: 8, but assisted generation is not timed with a prefix; use 0",
        ),
        (
            ["adapter@stages.draft.adapter=lora", "stages.draft.adapter.chain=continue"],
            "stages.draft.adapter.chain: the first layers are whole weights with all adapters merged",
        ),
        (["stages.draft.eval_fraction=0.01"], "12 prompts are too few to hold out a share of 0.01; add prompts"),
        (["stages.draft.layers=12"], "stages.draft.layers: 12, but stage:sft has 12 layers"),
        (["stages.small.layers=8"], "stages.small.layers: 8, but stage:draft has 8 layers"),
        (["stages.draft.teacher=stage:sfd"], "no stage 'sfd' in this run; did you mean 'sft'?"),
    ],
)
def test_what_cannot_be_right_is_refused_with_a_remedy(plan: MakePlan, changes: list[str], message: str) -> None:
    assert message in refusal(plan, *changes)


def test_a_reward_model_teaches_nothing(plan: MakePlan, tmp_path: Path) -> None:
    recipe = (tmp_path / "drafts.yaml").read_text().replace("stage@stages.sft: sft,", "stage@stages.sft: reward,")
    recipe = recipe.replace("stages:\n  sft: {", "stages:\n  sft: {init: base, ")
    (tmp_path / "drafts.yaml").write_text(recipe.replace("rows.jsonl", "preferences.jsonl"))
    assert "stages.draft.teacher: 'stage:sft' is a reward model; this slot takes a policy" in refusal(plan)


def test_more_layers_are_accepted_if_nothing_is_known_of_the_model(plan: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "model" / "config.json").write_text("{}")
    assert [stage.name for stage in plan("stages.draft.layers=99").stages] == ["sft", "draft", "small"]


def test_both_words_are_shown_to_a_user_who_asks_for_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stages"]) == 0
    printed = capsys.readouterr().out
    assert "distil" in printed
    assert "draft" in printed
