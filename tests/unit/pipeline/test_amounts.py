"""Too little data for a stage is said before anything trains: where, how much there is, and what would do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from alignment import cli
from alignment.config.data import DataConfig, MixedConfig
from alignment.config.optim import OptimConfig
from alignment.config.overoptimisation import GuardConfig
from alignment.config.stage import StageConfig
from alignment.config.validation import ValidationConfig
from alignment.core.errors import ConfigError
from alignment.data.records import Conversation, Prompt
from alignment.data.turns import Message
from alignment.pipeline.backends.feasibility import refuse_sizes
from alignment.pipeline.plan.plan import make_plan
from alignment.pipeline.plan.row_counts import Seen, faults
from alignment.pipeline.plan.row_counts import seen as amounts_of
from alignment.stages.cpt.config import CptConfig
from alignment.stages.dpo.config import DpoConfig
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.reward.config import RewardConfig
from alignment.stages.sft.config import SftConfig
from tests.unit.pipeline.conftest import ROWS, MakePlan

OPTIM = OptimConfig(lr=1e-4, batch_size=8, warmup_ratio=0.1)
LONGER = OptimConfig(lr=1e-4, batch_size=8, warmup_ratio=0.1, epochs=2)

SHORT = OptimConfig(lr=1e-4, batch_size=8, warmup_ratio=0.6, max_steps=2)
ALL_STEPS = (
    "stages.s.optim.warmup_ratio: the warm-up covers all optimiser steps (2); set stages.s.optim.warmup_ratio=0, or "
    "stages.s.optim.max_steps=3 or more"
)


def fault_messages(config: StageConfig, *, rows: int = 8, prompts: int | None = None, whole: bool = True) -> list[str]:
    seen = Seen(rows=rows, prompts=rows if prompts is None else prompts, whole=whole)
    return [str(fault) for fault in faults(config, {"data": seen}, where="stages.s")]


@pytest.mark.parametrize(
    ("config", "amount", "message"),
    [
        (
            PpoConfig(guard=GuardConfig(every=1, prompts=64)),
            {"rows": 90, "prompts": 64},
            "stages.s.guard.prompts: 64 prompts cannot be held out of 64; choose fewer, or set guard.every to 0",
        ),
        (
            PpoConfig(guard=GuardConfig(every=1, prompts=64), data=DataConfig(fraction=0.5)),
            {"rows": 120},
            "stages.s.guard.prompts: 64 prompts cannot be held out of 60; choose fewer, or set guard.every to 0",
        ),
        (
            RewardConfig(eval_fraction=0.1, optim=LONGER),
            {"rows": 9, "prompts": 4},
            "stages.s.eval_fraction: 4 prompts are too few to hold out a share of 0.1; add pairs, or set eval_fraction "
            "to 0",
        ),
        (
            SftConfig(optim=OPTIM),
            {"rows": 7},
            "stages.s.optim.warmup_ratio: the warm-up covers all optimiser steps (1 for 7 rows in batches of 8); "
            "set stages.s.optim.warmup_ratio=0, or stages.s.optim.epochs=2 or more",
        ),
        (
            DpoConfig(optim=SHORT),
            {"rows": 100},
            ALL_STEPS,
        ),
        (DpoConfig(optim=SHORT), {"rows": 5000, "whole": False}, ALL_STEPS),
        (SftConfig(optim=SHORT, data=DataConfig(mix=[MixedConfig(count=50)])), {"rows": 100}, ALL_STEPS),
        (SftConfig(optim=SHORT, packing=True), {"rows": 100}, ALL_STEPS),
        (CptConfig(optim=SHORT), {"rows": 100}, ALL_STEPS),
    ],
)
def test_data_that_is_too_little_is_named_exactly(config: StageConfig, amount: dict[str, Any], message: str) -> None:
    assert fault_messages(config, **amount) == [message]


@pytest.mark.parametrize(
    ("config", "amount"),
    [
        (PpoConfig(guard=GuardConfig(every=1, prompts=64)), {"rows": 65}),
        (PpoConfig(guard=GuardConfig(every=0, prompts=64)), {"rows": 2}),
        (RewardConfig(eval_fraction=0.1, optim=OPTIM), {"rows": 9}),
        (RewardConfig(eval_fraction=0.0, optim=LONGER), {"rows": 2}),
        (SftConfig(optim=LONGER), {"rows": 7}),
        (SftConfig(optim=OPTIM, packing=True), {"rows": 7}),
        (CptConfig(optim=OPTIM), {"rows": 1}),
        (DpoConfig(optim=OptimConfig(lr=1e-4, batch_size=8, warmup_ratio=0.4, max_steps=2)), {"rows": 7}),
        (SftConfig(optim=OPTIM), {"rows": 7, "whole": False}),
        (SftConfig(optim=OPTIM, data=DataConfig(mix=[MixedConfig(count=50)])), {"rows": 7}),
    ],
)
def test_enough_data_and_an_amount_that_nobody_knows_are_not_refused(
    config: StageConfig, amount: dict[str, Any]
) -> None:
    assert fault_messages(config, **amount) == []


@pytest.mark.parametrize("rows", [1, 7, 12, 100])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 2 / 3, 0.9, 0.99])
@pytest.mark.parametrize("amount", [{"epochs": 1}, {"epochs": 0.5}, {"max_steps": 1}])
def test_what_is_said_of_a_warm_up_of_all_steps_is_then_accepted(
    rows: int, ratio: float, amount: dict[str, Any]
) -> None:
    def messages(**changes: Any) -> list[str]:
        optim = OptimConfig(**{"lr": 1e-4, "batch_size": 16, "warmup_ratio": ratio, **amount, **changes})
        return fault_messages(SftConfig(optim=optim), rows=rows)

    for message in messages():
        words = re.findall(r"stages\.s\.optim\.(\w+)=([\d.]+)", message)
        assert len(words) == 2
        for name, value in words:
            assert messages(**{name: int(value)}) == [], message


@pytest.mark.parametrize(
    ("answers", "learned", "message"),
    [
        (5, 5, ""),
        (5, 1, "stages.s.validation.every: 20 is more than the 12 optimiser steps of the stage; choose at most 12"),
        (1, 1, "stages.s.validation.every: 20 is more than the 12 optimiser steps of the stage; choose at most 12"),
    ],
)
def test_a_conversation_counts_as_many_rows_as_it_may_become(answers: int, learned: int, message: str) -> None:
    """Templates that change earlier turns, such as Qwen3's, make a row of each learned answer."""

    def turns(number: int) -> list[Message]:
        asked, context = Message(role="user", content=f"{number}?"), answers - learned
        replies = [Message(role="assistant", content="Yes.", learned=index >= context) for index in range(answers)]
        return [turn for reply in replies for turn in (asked, reply)]

    seen = amounts_of([Conversation(messages=tuple(turns(number))) for number in range(200)], whole=True)
    config = SftConfig(
        optim=OptimConfig(lr=1e-4, batch_size=16, epochs=1), validation=ValidationConfig(share=0.1, every=20)
    )
    messages = [str(fault) for fault in faults(config, {"data": seen}, where="stages.s")]
    assert messages == ([message] if message else [])


def test_a_plan_counts_rows_and_different_prompts(plan: MakePlan, tmp_path: Path) -> None:
    row = ROWS["preferences"]
    lines = [json.dumps({**row, "chosen": f"On {day} March."}) for day in range(21, 25)]
    other = json.dumps({**row, "messages": [{"role": "user", "content": "And the exam?"}]})
    (tmp_path / "preferences.jsonl").write_text("\n".join([*lines, other]) + "\n")
    stages = {stage.name: stage for stage in plan("stages.dpo.data.limit=3").stages}
    assert (stages["reward"].seen["data"].rows, stages["reward"].seen["data"].prompts) == (5, 2)
    assert (stages["dpo"].seen["data"].rows, stages["dpo"].seen["data"].prompts) == (3, 1)
    assert stages["ppo"].seen["data"].whole


def test_a_smoke_run_of_ranked_lists_has_prompts_to_hold_out(overrides: list[str], tmp_path: Path) -> None:
    """A list of four answers gives six pairs of one prompt."""
    answers = [{"text": f"On {day} March.", "score": day} for day in range(1, 5)]
    lists = [{"prompt": f"When is training {number}?", "completions": answers} for number in range(12)]
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "defaults: [base, stage@stages.reward: reward, _self_]\n"
        f"stages: {{reward: {{init: base, data: {{source: 'path:{tmp_path}/ranked.jsonl'}}}}}}\n"
    )
    of_run = [override for override in overrides if not override.startswith("stages.")]
    planned = make_plan(str(recipe), [*of_run, "profile=smoke"])
    refuse_sizes(planned)
    (reward,) = planned.stages
    assert (reward.seen["data"].rows, reward.seen["data"].prompts) == (64, 11)


def test_prompts_that_differ_in_tools_or_calls_alone_are_different() -> None:
    """A template renders both, so a guard can hold out one of two such prompts."""
    asked = Message(role="user", content="Add them.")

    def tool(name: str) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "arguments": {"a": [1, 2]}}}

    tools = [Prompt(messages=(asked,), tools=(tool(name),)) for name in ("add", "sum", "sum")]
    calls = [Message(role="assistant", content="", tool_calls=(tool(name),)) for name in ("add", "sum", "sum")]
    assert amounts_of(tools, whole=True).prompts == 2
    assert amounts_of([Prompt(messages=(asked, call, asked)) for call in calls], whole=True).prompts == 2


def test_a_limited_amount_of_text_is_compared_with_the_evaluation_s() -> None:
    """500 evaluated and 2,000 learned texts of 3,000 words took 5 seconds, and a plan is promised to take a second."""
    long = Message(role="user", content="word " * 60_000)
    short = Message(role="user", content="Add them.")
    records = [Prompt(messages=(message,)) for message in (short, short, long, long, long, long, short)]
    counted = amounts_of(records, whole=True)
    assert [len(text.text) for text in counted.texts] == [9, 9, 300_000, 300_000, 300_000]
    assert (counted.rows, counted.prompts) == (7, 2)


def test_a_plan_refuses_sizes_that_no_machine_can_run(
    plan: MakePlan, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What the first stage could have trained for hours before the last one said so."""
    guard = "stages.ppo.guard={every: 1, prompts: 64, scorer: {source: 'bundled:quickstart/house_style.py:style'}}"
    wrong = ("stages.ppo.completions_per_prompt=3", guard, "stages.dpo.data.limit=7")
    with pytest.raises(ConfigError) as caught:
        refuse_sizes(plan(*wrong))
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert [line.partition(": ")[0] for line in lines[1:]] == [
        "stages.dpo.optim.warmup_ratio",
        "stages.ppo.completions_per_prompt",
        "stages.ppo.guard.prompts",
    ]
    assert cli.main(["plan", "quickstart", *overrides, *wrong]) == 2
    assert "32 episodes cannot be divided into groups of 3 completions" in capsys.readouterr().err


def test_a_plan_refuses_groups_of_one_answer(
    plan: MakePlan, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("advantage=rloo", "critic=none", "prompt_baseline=false", "gae_lambda=0.95", "value_clip=0.2")
    rloo = [f"stages.ppo.{each}" for each in (*settings, "optim.critic_lr=null")]
    refuse_sizes(plan(*rloo))
    assert cli.main(["plan", "quickstart", *overrides, *rloo, "stages.ppo.completions_per_prompt=1"]) == 2
    assert (
        "stages.ppo.completions_per_prompt: 1, but advantage 'rloo' compares the answers to a prompt; choose 2 or more"
        in " ".join(capsys.readouterr().err.split())
    )
