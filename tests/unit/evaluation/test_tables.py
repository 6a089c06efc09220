"""The tables of an evaluation, its rows of several turns and samples, and the files that hold them."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.config.scoring import MetricConfig
from alignment.core.errors import ArtifactError, NonFiniteError
from alignment.data.records import HeldOutPrompt
from alignment.data.turns import Message
from alignment.evaluation import paired_scores
from alignment.evaluation.arms import Answer, Answered, TokenSum, majority_score, pass_at_k, scores_of_prompts
from alignment.evaluation.exchanges import AskedTurn, asked_turns, continued, prompts_of_answers
from alignment.evaluation.paired_scores import labels, recorded
from alignment.evaluation.statistics import Intervals
from alignment.evaluation.tables import arm_result, by_task, refuse_not_finite, samples
from alignment.records.evaluation import (
    ARM_METRICS,
    ArmResult,
    Comparison,
    Evaluation,
    Judge,
    JudgedPair,
    Metric,
    Sample,
    SampleAnswer,
    TurnAnswer,
    read_samples,
    write_samples,
)
from alignment.records.interval import Interval
from alignment.report.run_page.run_records import Difference
from alignment.rewards.rules.similarity import final_number

INTERVALS = Intervals(samples=500, seed=3)
TOOL = {"type": "function", "function": {"name": "look"}}


def answered(*texts: str, per_prompt: int = 1, **changes: Any) -> Answered:
    """Answers to single turns, or to rows of so many ``turns``; one that ends in "…" did not end."""
    answers = [Answer(ids=[len(text), 2], text=text, ended=not text.endswith("…")) for text in texts]
    settings = {"logprobs": None, "references": [None] * (len(texts) // per_prompt), "seconds": 2.0}
    return Answered(answers=answers, per_prompt=per_prompt, **(settings | changes))


def result(arm: Answered, **changes: Any) -> ArmResult:
    settings = {"label": "dpo", "scores": {}, "rewards": None, "log_ratios": None, "win_rate": None}
    return arm_result("stage:dpo", arm, intervals=INTERVALS, **(settings | changes))


def test_a_row_says_how_many_answers_differ_and_ended() -> None:
    """Of two samples a prompt, the first answers are compared with each other, and both have words and an end."""
    texts = [text for index in range(4) for text in ("answer 0", f"I can't answer {index} so…")]
    arm = result(answered(*texts, per_prompt=2), log_ratios=[1.0, 3.0, 3.0, 1.0] * 2, scores={"brevity": [0.2] * 4})
    assert (arm.label, arm.metrics) == ("dpo", {"brevity": INTERVALS.of([0.2] * 4)})
    assert arm.distinct == 0.25
    assert arm.ended == arm.refusals == INTERVALS.of([0.5] * 4)
    assert arm.words == Interval(mean=3.5, low=3.5, high=3.5)
    assert (arm.reward, arm.loss, arm.perplexity) == (None, None, None)
    assert arm.greedy_log_ratio.mean == pytest.approx(2.0)
    assert list(arm.all_metrics) == ["brevity", "words", "greedy_log_ratio", "refusals", "distinct", "ended"]
    of_scripts = result(answered("今天休息", "Closed today, sorry.", "Ganz zu."))
    assert of_scripts.words.mean == pytest.approx(3.0), "characters are words in scripts without spaces"


def test_the_loss_is_a_mean_over_all_reference_tokens_and_its_interval_over_rows() -> None:
    """Answers of 2 and 6 tokens: (3 + 3) / 8 nats per token, not the mean of 1.5 and .5; no row without one counts."""
    short, long = TokenSum(logprob=-3.0, tokens=2), TokenSum(logprob=-3.0, tokens=6)
    apart = result(answered("x", "y", "z", references=[short, None, long]))
    together = result(answered("x", "y", references=[short, long], turns=[2])).loss
    assert (apart.loss.mean, apart.loss.low, apart.loss.high) == pytest.approx((0.75, 0.5, 1.5))
    assert apart.perplexity.mean == pytest.approx(math.exp(0.75))
    assert (together.mean, together.low, together.high) == (0.75, 0.75, 0.75), "no resample takes a row apart"


def test_a_row_of_turns_scores_their_mean_and_its_log_ratio_is_their_sum() -> None:
    """Rows of two turns and of one: the row counts once, however many turns it has."""
    arm = result(
        answered("one two", "three", "four five six", turns=[2, 1]),
        scores={"right": [1.0, 0.0, 0.25], "helpful": [None, None, 7.0]},
        rewards=[2.0, 4.0, 6.0],
        log_ratios=[1.5, 2.0, 0.5],
    )
    assert [mean.mean for mean in arm.metrics.values()] == pytest.approx([(0.5 + 0.25) / 2, 7.0])
    assert [{name: mean.mean for name, mean in of_turn.items()} for of_turn in arm.by_turn] == [
        {"right": pytest.approx(0.625), "helpful": 7.0},
        {"right": 0.0},
    ], "a turn in which no prompt has a score has no mean"
    for measured, expected in ((arm.reward, 9.0), (arm.greedy_log_ratio, 4.0), (arm.words, 4.5)):
        assert measured.mean == pytest.approx(expected / 2)
    assert "by_turn" not in arm.all_metrics
    arm = answered(*"abcdef", turns=[2, 1], per_prompt=2)
    assert arm.sums([1.0, 3.0, 10.0, 20.0, 5.0, 7.0]) == [2.0 + 15.0, 6.0]
    assert arm.means([1.0, 3.0, 10.0, 20.0, 5.0, 7.0]) == [(2.0 + 15.0) / 2, 6.0]
    assert [[answer.text for answer in exchange] for exchange in arm.exchanges] == [["a", "c"], ["e"]]


def test_labels_are_short_where_they_stay_different() -> None:
    arms = ["base", "stage:dpo", "path:/models/tiny", "path:/a/twin", "path:/b/twin", "hub:org/name@main"]
    assert list(labels(arms).values()) == ["base", "dpo", "tiny", "path:/a/twin", "path:/b/twin", "hub:org/name@main"]


@pytest.mark.parametrize(
    ("metric", "changes"),
    [
        ("reward", {"rewards": [1.0, math.nan]}),
        ("log-ratio", {"log_ratios": [math.inf, 0.0]}),
        ("loss", {"logprob": -math.inf}),
        ("perplexity", {"logprob": -8000.0}),
    ],
)
def test_nan_and_infinity_end_the_evaluation_and_are_named(metric: str, changes: dict[str, Any]) -> None:
    def check(*, logprob: float = -20.0, rewards: Any = None, log_ratios: Any = None) -> None:
        arm = answered("x", "y", references=[TokenSum(logprob=logprob, tokens=10), None])
        refuse_not_finite("stage:dpo", arm, rewards=rewards, log_ratios=log_ratios)

    check(rewards=[1.0, 2.0])
    with pytest.raises(NonFiniteError, match=f"the {metric} of stage:dpo is .* on 1 of"):
        check(**changes)


def row(first: str, *later: str, references: tuple[str, ...] = (), **changes: Any) -> HeldOutPrompt:
    messages = (Message(role="system", content="Be brief."), Message(role="user", content=first))
    return HeldOutPrompt(messages=messages, later_turns=later, later_references=references, id=first, **changes)


ROWS = [row("a1", "a2"), row("b1"), row("c1", "c2", "c3")]


def test_a_row_goes_on_with_the_answers_of_its_own_conversation() -> None:
    prompt = continued(ROWS[2], ["x", "y"])
    assert [turn.role for turn in prompt.messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [turn.content for turn in prompt.messages] == ["Be brief.", "c1", "x", "c2", "y", "c3"]
    assert continued(ROWS[1], []) is ROWS[1]
    two = row("a1", "a2", references=("second",))
    assert [continued(two, texts).reference for texts in ([], ["x"])] == ["", "second"]
    assert asked_turns(ROWS[:2]) == [AskedTurn(row=0, turn=0), AskedTurn(row=0, turn=1), AskedTurn(row=1, turn=0)]
    texts = ["a-1", "a-1'", "a-2", "a-2'", "b-1", "b-1'", "c-1", "c-1'", "c-2", "c-2'", "c-3", "c-3'"]
    asked = prompts_of_answers(ROWS, texts, per_prompt=2)
    assert [" ".join(message.content for message in prompt.messages[1:]) for prompt in asked] == [
        *("a1", "a1", "a1 a-1 a2", "a1 a-1' a2", "b1", "b1"),
        *("c1", "c1", "c1 c-1 c2", "c1 c-1' c2", "c1 c-1 c2 c-2 c3", "c1 c-1' c2 c-2' c3"),
    ]


def test_tasks_are_averaged_by_themselves_and_a_sample_holds_the_whole_exchange() -> None:
    rows = [
        row("a1", "a2", references=("second",), task="answer"),
        row("b1", task="extract", tools=(TOOL,)),
        row("c1", task="answer", choices=("This.", "That."), right=0),
    ]
    arm = answered("x", "x'", "y", "y'", "z", "z'", "w", "w'", turns=[2, 1, 1], per_prompt=2)
    scores = [1.0, 0.0, 0.5, 1.0]
    assert by_task(rows, {"base": [0.5, 0.25, 1.0]}) == {"answer": {"base": 0.75}, "extract": {"base": 0.25}}
    stored = samples(rows, {"base": arm}, {"base": {"right": scores}})
    first, second, _ = (sample.answers["base"] for sample in stored)
    assert (first.text, first.further, first.scores) == ("x", ["x'"], {"right": 0.5})
    assert [(turn.text, turn.scores) for turn in first.turns] == [("x", {"right": 1.0}), ("y", {"right": 0.0})]
    assert (stored[0].later_turns, stored[0].later_references) == (["a2"], ["second"])
    assert (second.text, second.turns, stored[1].later_turns) == ("z", [], [])
    assert (stored[1].tools, stored[2].choices) == ([TOOL], ["This.", "That."])
    assert stored[1].messages[1] == {"role": "user", "content": "b1"}
    assert isinstance(first.turns[0], TurnAnswer)


@pytest.mark.parametrize(("count", "right"), [(4, 0), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_all_choices_with_a_right_answer(count: int, right: int) -> None:
    correct = [index < right for index in range(count)]
    for k in range(1, count + 1):
        choices = list(itertools.combinations(correct, k))
        assert pass_at_k(correct, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)
    for k in (0, count + 1):
        with pytest.raises(ValueError, match=f"pass@{k}"):
            pass_at_k(correct, k)


def test_the_most_frequent_final_answer_has_the_score_and_ties_share_it() -> None:
    for answers, scores, expected in (
        (["18", "17", "17"], [1.0, 0.0, 0.0], 0.0),
        (["", "", "18"], [0.0, 0.0, 1.0], 1.0),
        (["", ""], [0.25, 0.75], 0.5),
        (["1", "2", "3", "3", "2"], [1.0, 0.4, 0.0, 0.0, 0.4], 0.2),
    ):
        assert majority_score(answers, scores) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("aggregate", "passing_score", "expected"),
    [
        ("mean", 1.0, [2 / 3, 0.4]),
        ("pass@1", 1.0, [2 / 3, 1 / 3]),
        ("pass@1", 0.2, [2 / 3, 2 / 3]),
        ("pass@2", 1.0, [1.0, 2 / 3]),
        ("majority", 1.0, [1.0, 0.6]),  # of "", 1080 and 7 none is more frequent; the empty one does not vote
    ],
)
def test_one_score_of_the_answers_to_each_prompt(aggregate: str, passing_score: float, expected: list[float]) -> None:
    texts = ["It is 18.", "So 1,080.00", "18", "no number", "$1080", "#### 7"]
    scores = scores_of_prompts(
        [1.0, 0.0, 1.0, 0.0, 0.2, 1.0], list(map(final_number, texts)),
        aggregate=aggregate, passing_score=passing_score, per_prompt=3,
    )  # fmt: skip
    assert scores == pytest.approx(expected)


HALF = Interval(mean=0.5, low=0.25, high=0.75)
DPO = ArmResult(name="stage:dpo", label="dpo", metrics={"brevity": HALF}, words=HALF, distinct=1.0, seconds=3.0)
PAIR = JudgedPair(arm="stage:dpo", against="base", wins=2, ties=1, losses=0, win_rate=HALF, metric_kappa=0.5)
GAIN = Comparison(arm="stage:dpo", against="base", difference=0.5, low=0.25, high=0.75, detectable=0.1)
ERRORS = Metric(name="errors", higher_is_better=False)
EVALUATION = Evaluation(
    num_prompts=3,
    metrics=[Metric(name="brevity"), ERRORS],
    primary="brevity",
    arms=[DPO, ArmResult(name="base")],
    comparisons=[GAIN],
    other_comparisons=[replace(GAIN, metric="errors", p=0.1, adjusted_p=0.2)],
    tasks={"answer": {"base": 0.5}},
    judge=Judge(kind="metric", name="errors", num_prompts=3, pairs=[PAIR]),
    conclusions=["Little."],
)


def test_an_evaluation_is_read_as_it_was_written(tmp_path: Path) -> None:
    EVALUATION.write(tmp_path)
    assert Evaluation.read(tmp_path) == EVALUATION
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["version"] == 2
    assert content["arms"][0]["metrics"] == {"brevity": {"mean": 0.5, "low": 0.25, "high": 0.75}}
    assert content["metrics"][1] == {"name": "errors", "higher_is_better": False, "of_answers": True}
    assert DPO.all_metrics == {"brevity": HALF, "words": HALF, "distinct": Interval(mean=1.0)}
    assert "loss" in ARM_METRICS
    assert not {"name", "label", "metrics", "seconds"} & set(ARM_METRICS)
    configs = [MetricConfig(name="knows", source="choice"), MetricConfig(name="right", source="exact_answer")]
    replace(EVALUATION, metrics=recorded(configs)).write(tmp_path)
    assert [metric.of_answers for metric in Evaluation.read(tmp_path).metrics] == [False, True]


@pytest.mark.parametrize("content", ["{", '{"version": 3}'])
def test_a_damaged_or_newer_evaluation_is_an_error_that_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"evaluation\.json"):
        Evaluation.read(tmp_path)


@pytest.mark.parametrize(("p", "words"), [(0.04999, "0.049"), (0.05, "0.05"), (0.0123, "0.012")])
def test_a_p_value_below_the_level_never_reads_as_the_level(p: float, words: str) -> None:
    """Beside "better", 0.05 would contradict the rule that p is below it."""
    between = Difference(run=1, arm="stage:dpo", metric=Metric(name="brevity"), interval=HALF, adjusted_p=p)
    in_words = [replace(GAIN, adjusted_p=p).p_in_words, replace(PAIR, adjusted_p=p).p_in_words, between.p_in_words]
    assert in_words == [f", adjusted p {words}"] * 3


def test_a_difference_between_runs_is_real_beyond_chance_on_enough_prompts() -> None:
    item = Difference(run=1, arm="stage:dpo", metric=Metric(name="brevity"), interval=HALF)
    for prompts, adjusted_p, verdict in (
        (10, 0.04, "better"),
        (9, 0.04, "fewer than 10 prompts"),
        (10, 0.05, "no real difference"),
        (10, None, "no real difference"),
    ):
        measured = replace(item, prompts=prompts, adjusted_p=adjusted_p)
        assert (measured.verdict, measured.real) == (verdict, verdict == "better")


def test_a_prompt_goes_by_all_that_was_asked_and_samples_are_read_as_they_were_written(tmp_path: Path) -> None:
    asked = Sample(id="1\u2028", messages=[{"role": "user", "content": "Which sentence\x85 is right?"}])
    prompts = [
        asked,
        replace(asked, id="2"),
        replace(asked, choices=["He goes.", "He go."]),
        replace(asked, choices=["They go.", "They goes."]),
        replace(asked, tools=[TOOL]),
        replace(asked, later_turns=["And now?"]),
    ]
    written = [
        replace(prompt, answers={"base": SampleAnswer(text="c\u2029d\n", scores={"right": number / 4})})
        for number, prompt in enumerate(prompts)
    ]
    write_samples(tmp_path, written)
    assert list(read_samples(tmp_path)) == written
    assert list(read_samples(tmp_path / "none")) == []
    assert list(paired_scores.scores(tmp_path, "base")["right"].values()) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    assert len(paired_scores.prompts(tmp_path)) == 6
    older = Sample(id="1", messages=[{"role": "user", "content": "Hi."}], later_turns=["So?"])
    assert older.prompt == '["1", [{"content": "Hi.", "role": "user"}], "So?"]', "the key is that of older files"
