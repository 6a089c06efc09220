"""evaluation.json and samples.jsonl: what is written is read again, by older forms too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from alignment.config.scoring import MetricConfig
from alignment.core.errors import ArtifactError
from alignment.evaluation import paired_scores
from alignment.evaluation.metrics import recorded
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
    read_samples,
    write_samples,
)
from alignment.records.interval import Interval
from alignment.report.run_page.run_records import Difference

HALF = Interval(mean=0.5, low=0.25, high=0.75)
DPO = ArmResult(name="stage:dpo", label="dpo", metrics={"brevity": HALF}, words=HALF, distinct=1.0, seconds=3.0)
PAIR = JudgedPair(arm="stage:dpo", against="base", wins=2, ties=1, losses=0, win_rate=HALF, metric_kappa=0.5)
EVALUATION = Evaluation(
    num_prompts=3,
    metrics=[Metric(name="brevity"), Metric(name="errors", higher_is_better=False)],
    primary="brevity",
    arms=[DPO, ArmResult(name="base")],
    comparisons=[Comparison(arm="stage:dpo", against="base", difference=0.5, low=0.25, high=0.75, detectable=0.1)],
    other_comparisons=[
        Comparison(
            arm="stage:dpo", against="base", metric="errors", difference=-1.0, low=-2.0, high=0.0, p=0.1, adjusted_p=0.2
        )
    ],
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


def test_a_metric_of_choices_is_recorded_as_one_that_reads_no_answers(tmp_path: Path) -> None:
    configs = [MetricConfig(name="knows", source="choice"), MetricConfig(name="right", source="exact_answer")]
    replace(EVALUATION, metrics=recorded(configs)).write(tmp_path)
    assert [metric.of_answers for metric in Evaluation.read(tmp_path).metrics] == [False, True]
    file = tmp_path / "evaluation.json"
    content = json.loads(file.read_text())
    for metric in content["metrics"]:
        del metric["of_answers"]
    file.write_text(json.dumps(content))
    assert [metric.of_answers for metric in Evaluation.read(tmp_path).metrics] == [True, True], "as in older files"


@pytest.mark.parametrize(
    ("p", "words"),
    [(0.0497, "0.049"), (0.04999, "0.049"), (0.05, "0.05"), (0.0502, "0.05"), (0.0123, "0.012"), (0.0001, "0.0001")],
)
def test_a_p_value_below_the_level_never_reads_as_the_level(p: float, words: str) -> None:
    """Beside "better", 0.05 would contradict the rule that p is below it."""
    between = Difference(run=1, arm="stage:dpo", metric=Metric(name="brevity"), interval=HALF, adjusted_p=p)
    compared, judged = replace(EVALUATION.comparisons[0], adjusted_p=p), replace(PAIR, adjusted_p=p)
    in_words = [compared.p_in_words, judged.p_in_words, between.p_in_words]
    assert in_words == [f", adjusted p {words}"] * 3


@pytest.mark.parametrize("content", ["{", "[]", '{"arms": [{"label": "dpo"}]}', '{"version": 3}'])
def test_a_damaged_or_newer_evaluation_is_an_error_that_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"evaluation\.json"):
        Evaluation.read(tmp_path)


def test_samples_are_read_as_they_were_written_whatever_stands_in_them(tmp_path: Path) -> None:
    samples = [
        Sample(
            id=f"{number}\u2028",
            messages=[{"role": "user", "content": "a\x85b"}],
            answers={"base": SampleAnswer(text="c\u2029d\n", scores={"brevity": 0.5})},
        )
        for number in range(2)
    ]
    write_samples(tmp_path, samples)
    assert list(read_samples(tmp_path)) == samples
    assert len({sample.prompt for sample in samples}) == 2
    assert list(read_samples(tmp_path / "none")) == []


def test_one_question_with_other_choices_or_tools_is_another_prompt(tmp_path: Path) -> None:
    asked = Sample(messages=[{"role": "user", "content": "Which sentence is right?"}])
    prompts = [
        asked,
        replace(asked, choices=["He goes.", "He go."]),
        replace(asked, choices=["They go.", "They goes."]),
        replace(asked, tools=[{"type": "function", "function": {"name": "look"}}]),
        replace(asked, later_turns=["And now?"]),
    ]
    answered = [
        replace(prompt, answers={"base": SampleAnswer(text="The first.", scores={"right": number / 4})})
        for number, prompt in enumerate(prompts)
    ]
    write_samples(tmp_path, answered)
    assert list(read_samples(tmp_path)) == answered
    assert list(paired_scores.scores(tmp_path, "base")["right"].values()) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert len(paired_scores.prompts(tmp_path)) == 5


def test_the_key_of_a_prompt_without_choices_is_that_of_older_files() -> None:
    assert Sample(id="1", messages=[{"role": "user", "content": "Hi."}], later_turns=["So?"]).prompt == (
        '["1", [{"content": "Hi.", "role": "user"}], "So?"]'
    )


@pytest.mark.parametrize(
    ("mean", "more", "less"),
    [(0.5, "better", "worse"), (-0.5, "worse", "better")],
)
def test_a_verdict_goes_by_the_direction(mean: float, more: str, less: str) -> None:
    assert Metric(name="brevity").direction(mean) == more
    errors = Metric(name="errors", higher_is_better=False)
    assert errors.direction(mean) == less
    turned = Comparison(arm="a", against="b", difference=mean, low=mean - 0.1, high=mean + 0.2).turned()
    assert (turned.arm, turned.against) == ("b", "a")
    assert (turned.low, turned.high) == (-mean - 0.2, -mean + 0.1)
    assert errors.direction(turned.difference) == more


@pytest.mark.parametrize(
    ("prompts", "adjusted_p", "verdict"),
    [
        (10, 0.04, "better"),
        (9, 0.04, "fewer than 10 prompts"),
        (10, 0.05, "no real difference"),
        (10, None, "no real difference"),
    ],
)
def test_a_difference_between_runs_is_real_beyond_chance_on_enough_prompts(
    prompts: int, adjusted_p: float | None, verdict: str
) -> None:
    interval = Interval(mean=0.5, low=0.25, high=0.75)
    item = Difference(
        run=1, arm="stage:dpo", metric=Metric(name="brevity"), interval=interval, prompts=prompts, adjusted_p=adjusted_p
    )
    assert item.verdict == verdict
    assert item.real == (verdict == "better")


def test_the_figures_of_an_arm_are_its_metrics_and_what_every_evaluation_measures() -> None:
    assert DPO.all_metrics == {"brevity": HALF, "words": HALF, "distinct": Interval(mean=1.0)}
    assert "loss" in ARM_METRICS
    assert not {"name", "label", "metrics", "seconds"} & set(ARM_METRICS)
