"""Evaluations as a plan sees them: metrics, judges, votes, examples and cards; and what the terminal shows of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment.core.errors import DataError
from alignment.pipeline.execute import notes
from alignment.pipeline.execute.summary import show_card, show_evaluation
from alignment.pipeline.plan.plan import PlannedStage
from alignment.records.evaluation import (
    ArmResult,
    Comparison,
    Evaluation,
    Judge,
    JudgedPair,
    Metric,
)
from alignment.records.interval import Interval
from alignment.records.reward_card import Baseline, RewardCard
from alignment.records.votes import TIE, append_vote
from tests.judged import DPO, SFT, pair, vote
from tests.unit.pipeline.conftest import TURN, MakePlan, leave_artifact, stage_of, write, write_rows
from tests.unit.pipeline.worker import INTERVAL

METRICS = "stages.evaluate.metrics"
JUDGE = "stages.evaluate.judge"
GRADER = "stages.evaluate.grader"
ENDPOINT = "endpoint={base_url: 'http://localhost:8000/v1', model: m}"
GRADED = (f"{METRICS}=[{{name: helpful, source: grade}}]", "stages.evaluate.primary=helpful", f"{GRADER}.{ENDPOINT}")
JUDGED = (f"{JUDGE}.kind=endpoint", f"{JUDGE}.{ENDPOINT}")
Evaluated = Callable[..., PlannedStage]


@pytest.fixture
def evaluated(plan: MakePlan) -> Evaluated:
    return lambda *overrides: stage_of(plan(*overrides), "evaluate")


@pytest.fixture
def fingerprint(evaluated: Evaluated) -> Callable[..., str]:
    return lambda *overrides: evaluated(*overrides).fingerprint


def test_any_prompts_do_and_rows_are_held_against_what_a_rule_looks_at(plan: MakePlan, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "heldout.jsonl", {"messages": [TURN], "answer": "#### 21"}, {"messages": [TURN]})
    plan(f"{METRICS}=[]")
    right = f"{METRICS}=[{{name: right, source: exact_answer}}]"
    plan(right, "stages.evaluate.data.limit=1")
    with pytest.raises(DataError, match=rf"{file}:2: 'answer' is missing"):
        plan(right)
    write(tmp_path / "heldout.jsonl", "")
    with pytest.raises(DataError, match="contains no rows"):
        plan()


TWO_ARMS = "stages.evaluate.arms=[base, 'stage:sft']"


@pytest.mark.parametrize(
    ("settings", "same", "different"),
    [
        (
            [TWO_ARMS],
            ["stages.evaluate.primary=style_and_facts", "stages.evaluate.system_prompt=Be brief."],
            ["stages.evaluate.primary=style", f"{METRICS}.1.higher_is_better=false", f"{METRICS}.1.name=manner"],
        ),
        ([], [], ["stages.evaluate.system_prompt=Be brief."]),
        (
            GRADED,
            [f"{GRADER}.endpoint.timeout=30", f"{GRADER}.endpoint.api_key_env=KEY"],
            [f"{GRADER}.{text}" for text in ("rubric=short", "highest=5", "show_reference=true", "endpoint.model=n")]
            + [f"{METRICS}=[{{name: helpful, source: grade, rubric: short}}]"],
        ),
        (
            JUDGED,
            [f"{JUDGE}.endpoint.{text}" for text in ("timeout=3", "retries=0", "concurrency=9", "api_key_env=PATH")],
            [f"{JUDGE}.endpoint.{text}" for text in ("model=n", "criteria=Short.", "base_url='http://localhost:1'")],
        ),
    ],
    ids=["metrics", "a system prompt", "a grader", "a judge"],
)
def test_what_counts_of_an_evaluation_s_settings(
    fingerprint: Callable[..., str], settings: list[str], same: list[str], different: list[str]
) -> None:
    first = fingerprint(*settings)
    assert {first, *(fingerprint(*settings, change) for change in same)} == {first}
    assert len({first, *(fingerprint(*settings, change) for change in different)}) == len(different) + 1


def test_examples_count_where_there_is_an_arm_for_them(evaluated: Evaluated, tmp_path: Path) -> None:
    arms, file = "stages.evaluate.arms=[base,base+few-shot]", tmp_path / "conversations.jsonl"
    source = f"stages.evaluate.few_shot.data.source=path:{file}"
    before = evaluated(arms, source)
    assert before.extra_data == {"few_shot.data": file}
    assert evaluated(arms, source, "stages.evaluate.few_shot.count=5").fingerprint != before.fingerprint
    assert evaluated(source).extra_data == {}
    write_rows(file, {"messages": [TURN, {"role": "assistant", "content": "On 22 March."}]})
    assert evaluated(arms, source).fingerprint != before.fingerprint
    write(file, "{}\n")
    with pytest.raises(DataError):
        evaluated(arms, source)


PEOPLE = f"{JUDGE}.kind=people"


def votes_in(path: Path, *, ties: int = 3, first_prompt: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    for index in range(30):
        about = pair(index)
        if first_prompt and index == 29:
            turns = [{"role": "user", "content": first_prompt}]
            about = type(about)(key=about.key, messages=turns, answers=about.answers)
        append_vote(path, vote(about, TIE if index < ties else DPO if index % 2 else SFT))
    return path


@pytest.fixture
def own_votes(tmp_path: Path) -> Path:
    return tmp_path / "out/runs/quickstart/evaluate/votes.jsonl"


def test_the_votes_content_counts_and_no_place(evaluated: Evaluated, own_votes: Path, tmp_path: Path) -> None:
    without = evaluated(PEOPLE)
    assert "files" not in without.identity
    leave_artifact(without)
    votes_in(own_votes)
    with_votes = evaluated(PEOPLE)
    assert with_votes.extra_data["judge.votes"] == own_votes
    assert with_votes.reason.startswith("judge.votes changed (nearest: evaluate-")
    copy = write(tmp_path / "copy.jsonl", own_votes.read_text())
    assert evaluated(PEOPLE, f"{JUDGE}.votes={copy}").fingerprint == with_votes.fingerprint
    append_vote(own_votes, vote(pair(99)))
    assert len({stage.fingerprint for stage in (without, with_votes, evaluated(PEOPLE))}) == 3
    assert evaluated().fingerprint == evaluated("name=other").fingerprint, "who judges by nobody reads none"
    write(own_votes, own_votes.read_text().replace("It is 5 from dpo.", "It is 6 from dpo."))
    with pytest.raises(DataError, match=r"votes\.jsonl:6: the prompt or an answer differs"):
        evaluated(PEOPLE)


ARM = ArmResult(
    name="stage:dpo",
    label="dpo",
    metrics={"brevity": Interval(**INTERVAL), "tone": Interval(mean=0.25)},
    words=Interval(mean=21.4),
    loss=Interval(mean=1.234),
)
BREVITY = Metric(name="brevity")
EVALUATION = Evaluation(num_prompts=30, metrics=[BREVITY, Metric(name="tone")], primary="brevity", arms=[ARM])
LESS = Comparison(arm="stage:dpo", against="stage:sft", difference=-0.1, low=-0.2, high=-0.05)
WINS = JudgedPair(
    arm="stage:dpo", against="stage:sft", wins=8, ties=5, losses=3,
    win_rate=Interval(mean=0.66, low=0.52, high=0.79), verdict="better",
)  # fmt: skip
INVALID = replace(WINS, invalid=0.4, win_rate=None, verdict="nothing can be concluded")


def printed(*, width: int = 200, reference: str | None = None, **changes: Any) -> str:
    console = Console(width=width, record=True)
    show_evaluation(console, replace(EVALUATION, **changes), reference=reference)
    return console.export_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"judge": Judge(name="m", pairs=[WINS, INVALID])},
            "by m, dpo against sft: nothing can be concluded (40% of the verdicts are invalid)",
        ),
        ({"judge": Judge(name="m", pairs=[WINS])}, "by m, dpo wins 0.66 (0.52 to 0.79) against sft: better"),
        (
            {"arms": [replace(ARM, greedy_log_ratio=Interval(mean=3.5))], "reference": "stage:sft"},
            "log-ratio of greedy answers to the reference (sft), in nats per sequence\n",
        ),
        ({"metrics": [], "primary": None}, "no metric, so no arm is called better"),
    ],
)  # fmt: skip
def test_the_terminal_says_what_the_figures_are_of(changes: dict[str, Any], words: str) -> None:
    assert words in printed(**changes)


def test_the_primary_metric_has_its_interval_and_says_which_way_is_better() -> None:
    for higher, verdict, better in ((True, "worse", "more"), (False, "better", "less")):
        metrics = [replace(BREVITY, higher_is_better=higher), Metric(name="tone")]
        text = printed(metrics=metrics, comparisons=[LESS])
        assert text.split()[:7] == ["arm", "brevity", "95", "%", "tone", "words", "loss"], "what no arm has is left out"
        assert "0.500  0.400–0.600  0.25   21.4" in text
        assert f"dpo against sft: -0.100 (-0.200 to -0.050), {verdict}" in text
        assert f"30 held-out prompts; brevity: {better} is better\n" in text
    columns = printed(arms=[replace(ARM, greedy_log_ratio=Interval(mean=3.5), kl=Interval(mean=2.25))])
    assert {"3.50", "2.25", "1.23"} <= set(columns.split())


def test_the_screen_says_how_often_a_reward_model_is_right_and_what_to_know_before() -> None:
    def interval(mean: float) -> Interval:
        return Interval(mean=mean, low=mean - 0.04, high=mean + 0.04)

    words = Baseline(name="bag of words", accuracy=interval(0.6), difference=interval(0.05))
    longer = Baseline(name="longer answer", accuracy=Interval(mean=0.4), difference=Interval(mean=0.25))
    card = RewardCard(accuracy=interval(0.65), num_pairs=500, baselines=[words, longer], warnings=["[b]Beware.[/b]"])
    console = Console(width=40, record=True)
    show_card(console, "card", card)
    assert console.export_text().splitlines() == [
        "card: right on 0.650 (0.610–0.690) of 500 pairs; bag of words 0.600 (0.560–0.640), difference +0.050 "
        "(+0.010 to +0.090); longer answer 0.400, difference +0.250",
        "  [b]Beware.[/b]",
    ]


def test_the_plan_counts_ties_and_warns_of_prompts_that_are_evaluated_too(plan: MakePlan, tmp_path: Path) -> None:
    def noted(path: Path) -> list[str]:
        sources = [f"stages.{stage}.data.source=path:{path}" for stage in ("reward", "dpo")]
        every = notes.of_plan(plan(*sources))
        return [note for note in every if "dpo" in note and ("left out" in note or "resemble" in note)]

    ties, resembles = noted(votes_in(tmp_path / "votes.jsonl", first_prompt=TURN["content"]))
    if "resemble" in ties:
        ties, resembles = resembles, ties
    assert ties.startswith("stages.reward.data and stages.dpo.data: 3 rows are left out")
    assert resembles.startswith("1 row that reward and dpo may learn from resembles prompts of evaluate")
    assert noted(votes_in(tmp_path / "others.jsonl", ties=0)) == []
