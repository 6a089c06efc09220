"""A judge and a grader served by transformers on this machine, asked through the real client by the user's command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from alignment.evaluation.verdicts import verdict_of
from tests.e2e.conftest import Align
from tests.transformers_server import missing, model_served


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """URL and name of the shipped model behind ``transformers serve``."""
    if reason := missing():
        pytest.skip(reason)
    with model_served(tmp_path_factory.mktemp("server")) as url_and_name:
        yield url_and_name


@pytest.mark.slow
def test_a_served_model_judges_in_both_orders(
    served: tuple[str, str], new_forked: Callable[[], Align], tmp_path: Path
) -> None:
    """A model of 135 million parameters is a poor judge; what it says is counted, and no silence becomes a verdict."""
    url, model = served
    align = replace(new_forked(), recipe="quickstart")
    others = [f"~stages.{stage}" for stage in ("sft", "reward", "dpo", "ppo")]
    printed = align(
        "run",
        *others,
        "stages.evaluate.arms=[base,base+prompt,base+few-shot]",
        "stages.evaluate.few_shot.count=1",
        "stages.evaluate.reference=base",
        "stages.evaluate.reward=null",
        "stages.evaluate.judge.kind=endpoint",
        "stages.evaluate.judge.max_prompts=2",
        "stages.evaluate.judge.pairs=[{arm: base+few-shot, against: base}]",
        f"stages.evaluate.judge.endpoint={{base_url: '{url}', model: '{model}', max_tokens: 24}}",
    )
    evaluation = json.loads((align.artifact("evaluate") / "evaluation.json").read_text())
    lines = (align.artifact("evaluate") / "judgements.jsonl").read_text().splitlines()
    calls = [json.loads(line) for line in lines]
    assert [call["shown_first"] for call in calls] == ["base+few-shot", "base"] * 2
    for call in calls:
        assert call["text"], "it answered"
        assert call["verdict"] == verdict_of(call["text"]).value
    (pair,) = evaluation["judge"]["pairs"]
    assert pair["invalid"] == sum(call["verdict"] == "invalid" for call in calls) / len(calls)
    assert pair["verdict"] in printed
    assert [arm["name"] for arm in evaluation["arms"]] == ["base", "base+prompt", "base+few-shot"]


@pytest.mark.slow
def test_a_served_model_grades_the_answers_that_ppo_learns_from(
    served: tuple[str, str], new_forked: Callable[[], Align]
) -> None:
    """Its replies are seldom grades; what is none has the score that the recipe names for it, and never another."""
    url, model = served
    align = replace(new_forked(), recipe="quickstart")
    others = [f"~stages.{stage}" for stage in ("reward", "dpo", "evaluate", "report")]
    grader = f"{{endpoint: {{base_url: '{url}', model: '{model}', max_tokens: 12}}, ungraded: -1}}"
    align(
        "run",
        *others,
        "stages.ppo.reward=null",
        "stages.ppo.updates=1",
        "stages.ppo.num_minibatches=1",
        "stages.ppo.optim.batch_size=4",
        f"stages.ppo.scorers=[{{source: grade, grader: {grader}}}, {{source: length, target: 4, weight: 0.5}}]",
    )
    folder = align.artifact("ppo")
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert samples
    for sample in samples:
        assert sample["scorers"]["grade"] in {-1.0, *map(float, range(1, 11))}
    (figures,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert -1.0 <= figures["score/grade"] <= 10.0
