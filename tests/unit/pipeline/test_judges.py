"""Evaluations with a judge, examples or models from outside: planned, or refused before anything starts."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from alignment.core.errors import ConfigError, DataError
from alignment.pipeline.backends.feasibility import why_not_here
from alignment.pipeline.execute.summary import show_evaluation
from alignment.pipeline.plan.plan import Plan
from alignment.records.evaluation import (
    ArmResult,
    Comparison,
    Evaluation,
    Grading,
    Judge,
    JudgedByPeople,
    JudgedPair,
    Metric,
)
from alignment.records.interval import Interval
from tests.unit.pipeline.conftest import TURN, MakePlan
from tests.unit.pipeline.worker import INTERVAL
from tests.weights_files import weights_file

JUDGE = "stages.evaluate.judge"
ENDPOINT = [
    f"{JUDGE}.kind=endpoint",
    f"{JUDGE}.endpoint.base_url='http://localhost:8000/v1'",
    f"{JUDGE}.endpoint.model=m",
]


PEOPLE = [f"{JUDGE}.kind=people"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            [f"{JUDGE}.kind=rules"],
            f"{JUDGE}.kind: 'rules' is not allowed; one of: none, metric, reward, endpoint, people",
        ),
        (
            [f"{JUDGE}.kind=metric", "stages.evaluate.metrics=[]"],
            f"{JUDGE}.kind: 'metric' judges by the primary metric, and stages.evaluate.metrics is empty; name one",
        ),
        ([f"{JUDGE}.kind=endpoint"], f"{JUDGE}.endpoint.base_url: missing"),
        ([f"{JUDGE}.kind=endpoint"], f"{JUDGE}.endpoint.model: missing"),
        (
            [f"{JUDGE}.kind=metric", f"{JUDGE}.endpoint.model=m"],
            f"{JUDGE}.endpoint: unused; only judge.kind 'endpoint' uses it",
        ),
        ([f"{JUDGE}.pairs=[{{arm: base, against: stage:sft}}]"], f"{JUDGE}.pairs: unused, because"),
        ([f"{JUDGE}.kind=reward", "stages.evaluate.reward=null"], f"{JUDGE}.kind: 'reward' judges by"),
        ([f"{JUDGE}.kind=metric", "stages.evaluate.arms=[base]"], f"{JUDGE}.pairs: no trained arm can be"),
        (
            [f"{JUDGE}.kind=metric", f"{JUDGE}.pairs=[{{arm: stage:dop, against: base}}]"],
            f"{JUDGE}.pairs[0].arm: 'stage:dop' is not an arm of this evaluation; did you mean 'stage:dpo'?",
        ),
        (
            [f"{JUDGE}.kind=metric", f"{JUDGE}.pairs=[{{arm: base, against: base}}]"],
            f"{JUDGE}.pairs[0]: 'base' is compared with itself",
        ),
        ([*ENDPOINT, f"{JUDGE}.endpoint.base_url=localhost:8000"], f"{JUDGE}.endpoint.base_url: the given value"),
        ([*ENDPOINT, f"{JUDGE}.endpoint.base_url='https://me:pass@host/v1'"], "without a key or a password in it"),
        ([*ENDPOINT, f"{JUDGE}.endpoint.base_url='https://host/v1?key=1'"], "without a key or a password in it"),
        ([*ENDPOINT, f"{JUDGE}.endpoint.api_key_env=sk-123"], "the name of an environment variable"),
        ([*ENDPOINT, f"{JUDGE}.endpoint.timeout=0"], f"{JUDGE}.endpoint.timeout: 0 is not allowed"),
        (
            [*ENDPOINT, f"{JUDGE}.endpoint.timeout=300"],
            f"{JUDGE}.endpoint.timeout: 300 seconds times 3 attempts is not",
        ),
        ([*ENDPOINT, f"{JUDGE}.max_invalid=1.5"], f"{JUDGE}.max_invalid: 1.5 is not allowed"),
        (
            [f"{JUDGE}.labelled.max_prompts=9", f"{JUDGE}.kind=metric"],
            f"{JUDGE}.labelled.data.source: missing, so the other settings are unused",
        ),
        (
            [f"{JUDGE}.labelled.data.source='bundled:quickstart/preferences'"],
            f"{JUDGE}.labelled: unused: a judge of the kind 'none' cannot judge pairs from a file",
        ),
        (
            [
                f"{JUDGE}.kind=metric",
                f"{JUDGE}.labelled.data.source='bundled:quickstart/preferences'",
                "stages.evaluate.metrics=[{name: mmlu, source: choice}]",
                "stages.evaluate.primary=mmlu",
            ],
            f"{JUDGE}.labelled: the primary metric has the source 'choice', which does not score answers",
        ),
        ([f"{JUDGE}.votes=v.jsonl"], f"{JUDGE}.votes: v.jsonl has no effect; only judge.kind 'people' uses it"),
        (["stages.evaluate.few_shot.count=0"], "stages.evaluate.few_shot.count: 0 is not allowed"),
        (["stages.evaluate.reference=base+few-shot"], "'base+few-shot' can only be an arm of an evaluation"),
        (["stages.sft.init=base+few-shot"], "'base+few-shot' can only be an arm of an evaluation"),
    ],
)
def test_a_judge_that_cannot_judge_is_refused(plan: MakePlan, settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(*settings)
    assert words in str(caught.value)


def test_without_the_client_an_endpoint_is_refused_with_what_to_install(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(*ENDPOINT)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openai" else find(name))
    with pytest.raises(ConfigError, match=r"pip install 'openai>=3,<4'"):
        plan(*ENDPOINT)
    plan(f"{JUDGE}.kind=metric")


def test_a_key_that_is_not_set_stops_a_run_and_no_plan(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    planned = plan(*ENDPOINT, f"{JUDGE}.endpoint.api_key_env=JUDGE_KEY")
    assert "the environment variable JUDGE_KEY is not set" in why_not_here(planned)
    monkeypatch.setenv("JUDGE_KEY", "sk-canary")
    assert why_not_here(planned) == ""
    assert "canary" not in repr(planned)


def evaluation(plan: Plan) -> str:
    return next(stage.fingerprint for stage in plan.stages if stage.name == "evaluate")


def test_how_an_endpoint_is_asked_changes_no_result_and_whom_and_what_does(plan: MakePlan) -> None:
    before = evaluation(plan(*ENDPOINT))
    for setting in ("timeout=3", "retries=0", "concurrency=9", "api_key_env=PATH"):
        assert evaluation(plan(*ENDPOINT, f"{JUDGE}.endpoint.{setting}")) == before
    for setting in ("model=other", "criteria=Shorter.", "base_url='http://localhost:1/v1'"):
        assert evaluation(plan(*ENDPOINT, f"{JUDGE}.endpoint.{setting}")) != before


ARMS = "stages.evaluate.arms=[base,base+few-shot]"


def test_examples_count_where_there_is_an_arm_for_them(plan: MakePlan, tmp_path: Path) -> None:
    source = f"stages.evaluate.few_shot.data.source=path:{tmp_path}/conversations.jsonl"
    (stage,) = [candidate for candidate in plan(ARMS, source).stages if candidate.name == "evaluate"]
    assert stage.extra_data == {"few_shot.data": tmp_path / "conversations.jsonl"}
    before, without = evaluation(plan(ARMS, source)), evaluation(plan(source))
    answer = {"role": "assistant", "content": "On 22 March."}
    (tmp_path / "conversations.jsonl").write_text(json.dumps({"messages": [TURN, answer]}) + "\n")
    assert evaluation(plan(ARMS, source)) != before
    assert evaluation(plan(source, "stages.evaluate.arms=[base]")) != without
    assert evaluation(plan(ARMS, "stages.evaluate.few_shot.count=5")) != evaluation(plan(ARMS))
    (tmp_path / "conversations.jsonl").write_text("{}\n")
    with pytest.raises(DataError):
        plan(ARMS, source)


def test_a_model_from_outside_may_be_an_arm(plan: MakePlan, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / "model.safetensors").write_bytes(weights_file(b"others"))
    planned = plan(f"stages.evaluate.arms=['path:{other}','hub:org/name@main']")
    (stage,) = [candidate for candidate in planned.stages if candidate.name == "evaluate"]
    assert stage.arms[f"path:{other}"].path == other
    assert not planned.sources["hub:org/name@main"].ready, "a run downloads it"


def test_an_empty_evaluation_set_is_refused(plan: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "heldout.jsonl").write_text("")
    with pytest.raises(DataError, match="contains no rows"):
        plan()


ARM = ArmResult(
    name="stage:dpo",
    label="dpo",
    metrics={"brevity": Interval(**INTERVAL), "tone": Interval(mean=0.25)},
    words=Interval(mean=21.4),
    loss=Interval(mean=1.234),
)
BREVITY = Metric(name="brevity")
EVALUATION = Evaluation(num_prompts=30, metrics=[BREVITY, Metric(name="tone")], primary="brevity", arms=[ARM])


def shown(evaluation: Evaluation, *, width: int = 200, reference: str | None = None) -> str:
    console = Console(width=width, record=True)
    show_evaluation(console, evaluation, reference=reference)
    return console.export_text()


def test_win_rates_stand_in_a_line_each_where_a_judge_was() -> None:
    pair = JudgedPair(
        arm="stage:dpo",
        against="stage:sft",
        wins=5,
        ties=1,
        losses=2,
        win_rate=Interval(mean=0.62, low=0.53, high=0.71),
        verdict="better",
    )
    nothing = replace(pair, invalid=0.4, win_rate=None, verdict="nothing can be concluded")
    printed = shown(replace(EVALUATION, judge=Judge(name="some-model", pairs=[pair, nothing])))
    assert "by some-model, dpo wins 0.62 (0.53 to 0.71) against sft: better" in printed
    assert "by some-model, dpo against sft: nothing can be concluded (40% of the verdicts are invalid)" in printed


def test_the_terminal_says_what_a_win_rate_of_votes_is_over_and_whether_people_and_the_metric_agree() -> None:
    """A win rate over sixteen prompts, of which people judged thirteen, names both numbers."""
    pair = JudgedPair(
        arm="stage:dpo",
        against="stage:sft",
        prompts=17,
        wins=8,
        ties=5,
        losses=3,
        win_rate=Interval(mean=0.66, low=0.52, high=0.79),
        verdict="better",
        metric_agreement=4 / 13,
        metric_kappa=-0.2,
        metric_prompts=13,
        people=JudgedByPeople(judged=13, same_answers=3, annotators=2, votes=20, alpha=0.612),
    )
    judge = Judge(kind="people", name="the votes of people", num_prompts=13, pairs=[pair])
    assert (
        "by the votes of people, dpo wins 0.66 (0.52 to 0.79) against sft: better (over 16 of 17 prompts: 13 judged, "
        "3 with identical answers; 20 votes, annotators: 2, Krippendorff's α 0.61); brevity prefers the same arm on "
        "31% of 13 prompts with different answers (κ -0.20)\n"
    ) in shown(replace(EVALUATION, judge=judge))
    silent = replace(pair, metric_agreement=None, metric_kappa=None, metric_prompts=None, people=None)
    assert "against sft: better\n" in shown(replace(EVALUATION, judge=replace(judge, pairs=[silent])))


def test_the_terminal_says_that_p_is_adjusted() -> None:
    less = Comparison(arm="stage:dpo", against="stage:sft", difference=-0.1, low=-0.2, high=-0.05, adjusted_p=0.38)
    printed = shown(replace(EVALUATION, comparisons=[less]))
    assert "dpo against sft: -0.100 (-0.200 to -0.050), adjusted p 0.38, no real difference" in printed


def test_arms_and_prompts_without_grades_are_named() -> None:
    grading = Grading(metric="brevity", model="m", num_prompts=2, invalid={"stage:dpo": 0.4}, left_out=["stage:dpo"])
    printed = shown(replace(EVALUATION, gradings=[grading]))
    assert "By brevity, nothing can be concluded about dpo (40%): " in printed
    assert "brevity covers 2 of 30 prompts; " in printed


def test_the_primary_metric_has_its_interval_and_says_which_way_is_better() -> None:
    down = replace(BREVITY, higher_is_better=False)
    less = Comparison(arm="stage:dpo", against="stage:sft", difference=-0.1, low=-0.2, high=-0.05)
    for metric, verdict, better in ((BREVITY, "worse", "more"), (down, "better", "less")):
        printed = shown(replace(EVALUATION, metrics=[metric, Metric(name="tone")], comparisons=[less]))
        assert printed.split()[:7] == ["arm", "brevity", "95", "%", "tone", "words", "loss"], (
            "what no arm has is left out"
        )
        assert "0.500  0.400–0.600  0.25   21.4" in printed
        assert f"dpo against sft: -0.100 (-0.200 to -0.050), {verdict}" in printed
        assert f"30 held-out prompts; brevity: {better} is better\n" in printed


def test_the_terminal_says_what_log_ratios_and_divergences_are_of() -> None:
    greedy = shown(replace(EVALUATION, arms=[replace(ARM, greedy_log_ratio=Interval(mean=3.5))]), reference="stage:sft")
    assert "3.50" in greedy
    assert "more is better; log-ratio of greedy answers to the reference (sft), in nats per sequence\n" in greedy
    sampled = shown(replace(EVALUATION, arms=[replace(ARM, kl=Interval(mean=2.25))]))
    assert "2.25" in sampled
    assert "more is better; KL from the reference on sampled answers, in nats per sequence\n" in sampled


def test_no_figure_is_cut_where_the_terminal_is_narrow() -> None:
    names = [f"a_metric_with_a_long_name_{number}" for number in range(4)]
    metrics = [Metric(name=name) for name in names]
    arm = replace(ARM, metrics={name: Interval(mean=0.125 * number) for number, name in enumerate(names)})
    wide = shown(replace(EVALUATION, metrics=metrics, primary=names[0], arms=[arm]))
    narrow = shown(replace(EVALUATION, metrics=metrics, primary=names[0], arms=[arm]), width=60)
    assert "…" not in narrow
    table = [line.split() for line in wide.splitlines()[1:3]]
    assert [line.split() for line in narrow.splitlines()[1:3]] == table
    assert {"0.12", "0.25", "0.38"} <= set(table[1])


def test_an_evaluation_without_metrics_shows_what_was_measured_and_compares_nothing() -> None:
    printed = shown(replace(EVALUATION, metrics=[], primary=None))
    assert printed.split()[:4] == ["arm", "words", "loss", "dpo"]
    assert "1.23" in printed
    assert "no metric, so no arm is called better" in printed


def test_labelled_rows_that_the_judging_metric_cannot_read_are_refused_by_the_plan(
    plan: MakePlan, tmp_path: Path
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "2 + 2?", "chosen": "4.", "rejected": "5."}\n')
    labelled = [f"{JUDGE}.kind=metric", f"{JUDGE}.labelled.data.source='path:{file}'", "stages.evaluate.primary=facts"]
    metric = "stages.evaluate.metrics=[{name: facts, source: %s}]"
    assert evaluation(plan(*labelled, metric % "refusal")) != evaluation(
        plan(*labelled[:1], labelled[2], metric % "refusal")
    )
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: 'facts' is missing"):
        plan(*labelled, metric % "key_facts")
