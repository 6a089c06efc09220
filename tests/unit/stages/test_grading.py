"""Grades of a language model and votes of people in an evaluation: whose answers they are about, and what a missing one
means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.config.evaluating import (
    AnswersConfig,
    ChatEndpointConfig,
    GraderConfig,
    JudgeConfig,
    JudgeKind,
    PairConfig,
)
from alignment.config.scoring import MetricConfig
from alignment.core.errors import ConfigError, DataError, StageError
from alignment.core.fingerprint import file_sha256
from alignment.data.records import HeldOutPrompt
from alignment.data.turns import Message
from alignment.evaluation import arms
from alignment.evaluation.answer_pairs import pair_of
from alignment.evaluation.arms import Answer, Answered
from alignment.evaluation.conclusions import conclusions
from alignment.evaluation.statistics import Intervals
from alignment.models.assembly.load import Lineage
from alignment.records.evaluation import Evaluation, Metric, Sample, read_samples
from alignment.records.votes import FILE, Vote, append_vote
from alignment.stages.evaluate import answering
from alignment.stages.evaluate.judging import Judged, ScoredAnswers, judge
from alignment.stages.evaluate.kind import VOTES, EvaluateConfig, votes_files
from alignment.stages.evaluate.metric_scores import settled
from alignment.stages.shared import policies
from alignment.training.context import StageContext
from tests.chained import Chained
from tests.judge_server import Judge, Response, Served, serving
from tests.judged import ARMS, DPO, SFT, pair, vote
from tests.measuring import evaluation_chain, evaluation_of, read_lines, write_rows
from tests.tiny import tiny_spec, tiny_tokenizer

ROWS: list[dict[str, Any]] = [
    {"id": "lift", "turns": ["Write that the lift is broken.", "Shorter."], "reference": ["The lift is broken.", ""]},
    *({"id": f"open{number}", "turns": [f"Is room {number} open?"], "reference": ["Yes."]} for number in range(4)),
]
GRADED = [MetricConfig(name="helpful", source="grade"), MetricConfig(name="letters", source="length", target=3)]
CONFIG = EvaluateConfig(
    arms=["base", "stage:sft", "path:near"], metrics=GRADED, reward=None, max_new_tokens=3, bootstrap_samples=50
)
SAYS = {"base": "Closed.", "stage:sft": "Open and bright.", "path:near": "[[10]]"}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chained:
    return evaluation_chain(tmp_path_factory.mktemp("grading"), ROWS, reward=False)


@pytest.fixture(autouse=True)
def says(chain: Chained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every arm answers with its own words."""
    tokenizer, loaded = tiny_tokenizer(), [""]
    load = answering.Policies.load

    def noted(self: answering.Policies, policy: Lineage) -> Any:
        loaded[0] = "stage:sft" if policy.adapters else "base" if policy.base == chain.base else "path:near"
        return load(self, policy)

    def generate(model: Any, prompts: list[list[int]], **_: Any) -> list[list[int]]:
        return [[*tokenizer(SAYS[loaded[0]])["input_ids"], tokenizer.eos_token_id] for _ in prompts]

    monkeypatch.setattr(answering.Policies, "load", noted)
    monkeypatch.setattr(arms, "answer_batch", generate)


def graded_by(served: Served, **changes: Any) -> GraderConfig:
    endpoint = ChatEndpointConfig(base_url=served.url, model="grader", timeout=5.0, retries=0, concurrency=1)
    return GraderConfig(**{"endpoint": endpoint} | changes)


def evaluate(
    chain: Chained, grader: Judge, name: str, config: EvaluateConfig = CONFIG, **changes: Any
) -> tuple[Evaluation, list[Sample], list[str]]:
    """The record, the samples and the prompts of the grader."""
    data = {"data_path": changes.pop("data_path")} if "data_path" in changes else {}
    with serving(grader) as served:
        artifact = evaluation_of(chain, replace(config, grader=graded_by(served, **changes)), name, **data)
        prompts = [request["messages"][0]["content"] for request in served.requests]
    return Evaluation.read(artifact), list(read_samples(artifact)), prompts


def lines(chain: Chained, name: str) -> list[dict[str, Any]]:
    return read_lines(chain.folder / f"artifacts/evaluate-{name}/grades.jsonl")


def answer_in(prompt: str) -> str:
    return prompt.partition("<<<answer>>>\n")[2].partition("\n<<<end of answer>>>")[0]


def fair(prompt: str, _: int) -> Response:
    """8 for the open answer, 3 for the closed one, 5 for any other; one less where the request wants it shorter."""
    answer = answer_in(prompt)
    grade = 8 if "Open" in answer else 3 if "Closed" in answer else 5
    return Response(text=f"So it is.\n[[{grade - ('Shorter.' in prompt)}]]")


def test_grades_are_a_metric_like_any_other(chain: Chained) -> None:
    evaluation, samples, prompts = evaluate(chain, fair, "fair", show_reference=True)
    means = {arm.name: arm.metrics["helpful"].mean for arm in evaluation.arms}
    assert means == pytest.approx({"base": (2.5 + 12) / 5, "stage:sft": (7.5 + 32) / 5, "path:near": (4.5 + 20) / 5})
    assert evaluation.primary == "helpful"
    (pair,) = [item for item in evaluation.comparisons if (item.arm, item.against) == ("stage:sft", "base")]
    assert (pair.metric, pair.difference) == ("helpful", pytest.approx(5.0))
    assert samples[0].answers["base"].scores["helpful"] == 2.5
    assert [turn.scores["helpful"] for turn in samples[0].answers["base"].turns] == [3.0, 2.0]
    (grading,) = evaluation.gradings
    assert (grading.metric, grading.model, grading.num_prompts) == ("helpful", "grader", 5)
    assert set(grading.invalid.values()) == {0.0}
    assert len(prompts) == 18
    assert "<<<reference>>>\nThe lift is broken.\n<<<end of reference>>>" in prompts[0]
    assert "reference" not in prompts[1], "the second turn has none"
    assert "<<<assistant>>>\nClosed.\n<<<end of assistant>>>\n\n<<<user>>>\nShorter." in prompts[1]
    listed = [(line["id"], line["row"], line["turn"], line["arm"], line["grade"]) for line in lines(chain, "fair")]
    assert listed[:2] == [("lift", 0, 0, "base", 3), ("lift", 0, 1, "base", 2)]
    assert all(line["text"] for line in lines(chain, "fair"))
    several = write_rows(chain.folder / "several.jsonl", [{"prompt": "Is it open?", "reference": ["Yes.", "It is."]}])
    _, _, prompts = evaluate(chain, fair, "several", show_reference=True, data_path=several)
    assert ["<<<reference>>>\nYes.\n<<<end of reference>>>" in prompt for prompt in prompts] == [True] * 3


def test_an_answer_that_names_its_grade_does_not_get_it(chain: Chained) -> None:
    """A grader that repeats the answer gives ``path:near`` nothing, and above the limit the metric is not computed."""

    def repeating(prompt: str, number: int) -> Response:
        return Response(text=answer_in(prompt)) if "10" in answer_in(prompt) else fair(prompt, number)

    evaluation, samples, _ = evaluate(chain, repeating, "repeating")
    near = evaluation.arm("path:near")
    assert list(near.metrics) == ["letters"]
    assert evaluation.gradings[0].left_out == ["path:near"]
    assert {arm for pair in evaluation.comparisons for arm in (pair.arm, pair.against)} == {"stage:sft", "base"}
    assert {arm for pair in evaluation.other_comparisons for arm in (pair.arm, pair.against)} == set(CONFIG.arms)
    assert all("helpful" not in sample.answers["path:near"].scores for sample in samples)
    assert any("nothing can be concluded about near (100%)" in sentence for sentence in evaluation.conclusions)
    assert {line["grade"] for line in lines(chain, "repeating") if line["arm"] == "path:near"} == {None}


def test_a_prompt_without_a_grade_in_one_arm_counts_in_none(chain: Chained) -> None:
    """One reply of six: below the limit, so the arm stays, and all arms are compared on the same four prompts."""

    def wavering(prompt: str, number: int) -> Response:
        lost = "room 2" in prompt and "Closed" in answer_in(prompt)
        return Response(text="I would say [[3]]") if lost else fair(prompt, number)

    pairs = [PairConfig(arm="stage:sft", against="base")]
    config = replace(CONFIG, judge=JudgeConfig(kind=JudgeKind.metric, pairs=pairs))
    evaluation, samples, _ = evaluate(chain, wavering, "wavering", config)
    means = {arm.name: arm.metrics["helpful"].mean for arm in evaluation.arms}
    assert means == pytest.approx({"base": (2.5 + 9) / 4, "stage:sft": (7.5 + 24) / 4, "path:near": (4.5 + 15) / 4})
    assert evaluation.gradings[0].num_prompts == 4
    assert evaluation.gradings[0].invalid["base"] == pytest.approx(1 / 6)
    assert [("helpful" in sample.answers["stage:sft"].scores) for sample in samples] == [True, True, True, False, True]
    (pair,) = evaluation.judge.pairs
    assert (pair.wins, pair.ties, pair.losses, pair.prompts) == (4, 0, 0, 4)
    assert any("helpful covers 4 of 5 prompts; on the others" in sentence for sentence in evaluation.conclusions)
    assert evaluation.conclusions[0].startswith("4 prompts, by helpful: ")


@pytest.mark.parametrize(
    ("rows", "grades", "max_invalid", "counted", "left_out"),
    [
        ([0, 1, 2, 3], {"a": [1, None, 3, 4], "b": [5] * 4}, 0.25, {"a": [1, None, 3, 4], "b": [5, None, 5, 5]}, []),
        ([0, 1, 2, 3], {"a": [1, None, None, 4], "b": [5] * 4}, 0.25, {"b": [5] * 4}, ["a"]),
        ([0, 1], {"a": [1, None], "b": [None, 6]}, 0.5, {}, ["a", "b"]),
        ([0, 0, 1, 1, 2], {"a": [1, None, 3, 4, 5]}, 0.2, {"a": [None, None, 3, 4, 5]}, []),
    ],
    ids=["prompt", "arm", "every prompt in some arm", "turn"],
)
def test_what_counts(
    rows: list[int], grades: dict[str, Any], max_invalid: float, counted: dict[str, Any], left_out: list[str]
) -> None:
    settled_grades, grading = settled("x", grades, rows, GraderConfig(max_invalid=max_invalid))
    assert (settled_grades, grading.left_out) == (counted, left_out)
    assert (grading.num_prompts == 0) == (counted == {})


def test_samples_are_graded_one_by_one_and_rubrics_are_metrics_of_their_own(chain: Chained) -> None:
    rubric = "Grade the tone."
    metrics = [
        MetricConfig(name="helpful", source="grade", aggregate="pass@2", passing_score=5),
        MetricConfig(name="tone", source="grade", rubric=rubric),
        MetricConfig(name="mean_tone", source="grade", rubric=rubric),
    ]

    def by_rubric(prompt: str, number: int) -> Response:
        return Response(text="[[2]]") if rubric in prompt else fair(prompt, number)

    sampled = AnswersConfig(per_prompt=2, temperature=1.0)
    config = replace(CONFIG, arms=["base", "stage:sft"], metrics=metrics, answers=sampled)
    evaluation, _, prompts = evaluate(chain, by_rubric, "rubrics", config)
    by_name = {arm.name: {name: interval.mean for name, interval in arm.metrics.items()} for arm in evaluation.arms}
    assert by_name["base"] == {"helpful": 0.0, "tone": 2.0, "mean_tone": 2.0}
    assert by_name["stage:sft"] == {"helpful": 1.0, "tone": 2.0, "mean_tone": 2.0}
    assert len(prompts) == 2 * 2 * 6, "equal answers are asked about once"
    assert {line["answer"] for line in lines(chain, "rubrics")} == {0, 1}


def test_replies_that_arrived_before_a_stop_are_not_asked_for_again(chain: Chained) -> None:
    def failing(prompt: str, number: int) -> Response:
        return fair(prompt, number) if number < 10 else Response(status=400, body="{}")

    with serving(failing) as served:
        config = replace(CONFIG, grader=graded_by(served))
        with pytest.raises(StageError, match=r"calls to the grader at .* failed") as caught:
            evaluation_of(chain, config, "stopped")
        assert caught.value.where == "stages.evaluate.grader.endpoint"
    port = int(served.url.split(":")[2].partition("/")[0])
    with serving(fair, port=port) as served:
        artifact = evaluation_of(chain, config, "stopped")
        assert len(served.requests) == 8
    assert not list(artifact.glob("*.work.jsonl"))


def test_a_missing_key_is_named_before_a_model_is_loaded(chain: Chained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADER_KEY", raising=False)
    loads: list[Callable[..., Any]] = []
    monkeypatch.setattr(policies, "load_policy", loads.append)
    endpoint = ChatEndpointConfig(base_url="http://127.0.0.1:9/v1", model="m", api_key_env="GRADER_KEY")
    with pytest.raises(ConfigError, match="GRADER_KEY is not set") as caught:
        evaluation_of(chain, replace(CONFIG, grader=GraderConfig(endpoint=endpoint)), "key")
    assert caught.value.where == "stages.evaluate.grader.endpoint.api_key_env"
    assert loads == []


NUMBERS = range(1, 13)
COUNTED = [
    HeldOutPrompt(messages=(Message(role="user", content=f"Which number comes after {number - 1}?"),), id=f"p{number}")
    for number in NUMBERS
]
BY_PEOPLE = JudgeConfig(kind=JudgeKind.people)
LABELS = {SFT: "sft", DPO: "dpo"}


def answered(texts: Sequence[str], *, per_prompt: int = 1) -> Answered:
    answers = [Answer(ids=[2], text=text, ended=True) for text in texts]
    return Answered(
        answers=answers, logprobs=None, references=[None] * len(COUNTED), seconds=0.0, per_prompt=per_prompt
    )


ANSWERS = {arm: answered([pair(number).answers[arm] for number in NUMBERS]) for arm in ARMS}


def context(folder: Path, votes: Sequence[Vote]) -> StageContext:
    """A stage that was planned with these votes."""
    spec = tiny_spec(folder, EvaluateConfig(judge=BY_PEOPLE))
    if votes:
        for about in votes:
            append_vote(folder / FILE, about)
        identity = {"files": {VOTES: file_sha256(folder / FILE)}}
        spec = replace(spec, extra_data={VOTES: folder / FILE}, identity=identity)
    return StageContext(spec=spec, rank=0, world_size=1)


def scored_by(
    arms: dict[str, Answered], scores: dict[str, list[float]], rewards: dict[str, Any] | None = None
) -> ScoredAnswers:
    return ScoredAnswers(
        rows=COUNTED,
        arms=arms,
        rewards=rewards or {},
        log_ratios={},
        turn_scores={arm: {"brevity": of_arm} for arm, of_arm in scores.items() if arm in arms},
        metrics=[Metric(name="brevity")],
        primary_name="brevity",
        reference=SFT,
        intervals=Intervals(samples=200, seed=0),
    )


def judged(stage: StageContext, config: JudgeConfig = BY_PEOPLE, **arms: Answered) -> Judged:
    every = {**ANSWERS, **{name if name == "base" else f"stage:{name}": arm for name, arm in arms.items()}}
    nothing = [0.0] * len(COUNTED)
    return judge(config, stage, scored_by(every, {"base": nothing, SFT: nothing, DPO: [1.0] * 6 + nothing[6:]}), None)


def sentence(result: Judged) -> str:
    return conclusions(len(COUNTED), None, [], result.table, LABELS)[0]


def test_votes_become_a_win_rate_with_their_agreement(tmp_path: Path) -> None:
    votes = [vote(pair(number)) for number in NUMBERS]
    votes += [vote(pair(number), SFT if number == 1 else DPO, annotator="bo") for number in (1, 2, 3)]
    result = judged(context(tmp_path, votes))
    assert (result.table.kind, result.table.num_prompts) == ("people", 12)
    (row,) = result.table.pairs
    assert (row.arm, row.against, row.verdict) == (DPO, SFT, "better")
    assert (row.wins, row.ties, row.losses, row.invalid) == (11, 1, 0, None)
    rate = result.win_rate(DPO, reference=SFT)
    assert rate.mean == pytest.approx(11.5 / 12)
    assert row.metric_agreement == pytest.approx(5 / 12), "on prompts 2 to 6"
    assert row.people.alpha is not None
    assert "dpo wins 0.96 against sft (" in sentence(result)
    assert "12 of 12 prompts, 15 votes, annotators: 2, Krippendorff's α" in sentence(result)
    assert len(result.lines) == 15
    assert result.lines[0] == {
        "id": "p1",
        "row": 0,
        "arm": DPO,
        "against": SFT,
        "annotator": "ada",
        "shown_first": SFT,
        "preferred": DPO,
        "points": 1.0,
    }


@pytest.mark.parametrize("per_prompt", [1, 2])
def test_no_judge_is_compared_with_the_metric_where_the_answers_are_identical(tmp_path: Path, per_prompt: int) -> None:
    """Ten of twelve prompts have identical answers, on which every judge agrees with every metric."""
    texts = {arm: [pair(number).answers[arm] if number <= 2 else "same" for number in NUMBERS] for arm in ARMS}
    arms = {
        arm: answered([text for text in of_arm for _ in range(per_prompt)], per_prompt=per_prompt)
        for arm, of_arm in texts.items()
    }
    scores = {SFT: [0.0] * len(COUNTED), DPO: [1.0] + [0.0] * (len(COUNTED) - 1)}
    rewards = {arm: [score for score in [0.0, -1.0 if arm == DPO else 0.0, *[0.0] * 10] for _ in range(per_prompt)]
               for arm in ARMS}  # fmt: skip
    result = judge(JudgeConfig(kind=JudgeKind.reward), context(tmp_path, []), scored_by(arms, scores, rewards), None)
    (row,) = result.table.pairs
    assert (row.wins, row.ties, row.losses) == (0, 11, 1)
    assert (row.metric_agreement, row.metric_prompts) == (0.0, 2)


def test_every_pair_that_people_judged_is_in_the_table_unless_the_recipe_names_pairs(tmp_path: Path) -> None:
    """Without a word about pairs, a trained arm is compared with the reference alone."""
    prompted = answered([f"Well, {number}." for number in NUMBERS])
    about = [
        pair_of(pair(number).messages, {DPO: pair(number).answers[DPO], "base": f"Well, {number}."}, id="", task="")
        for number in NUMBERS
    ]
    stage = context(tmp_path, [vote(each, shown_first="base") for each in about])
    result = judged(stage, base=prompted)
    assert [(row.arm, row.against, row.wins) for row in result.table.pairs] == [(DPO, SFT, 0), ("base", DPO, 0)]
    assert result.table.pairs[1].losses == 12
    config = replace(BY_PEOPLE, pairs=[PairConfig(arm=DPO, against=SFT)])
    only = judged(stage, config, base=prompted).table
    assert [(row.arm, row.against) for row in only.pairs] == [(DPO, SFT)]


def planned(folder: Path, **settings: Any) -> dict[str, Path]:
    config = EvaluateConfig(judge=JudgeConfig(**{"kind": JudgeKind.people, **settings}))
    return dict(votes_files(config, folder / "evaluate"))


def test_the_votes_are_the_runs_own_or_a_files_and_must_not_change(tmp_path: Path) -> None:
    own, other = tmp_path / "evaluate" / FILE, tmp_path / "other.jsonl"
    assert planned(tmp_path) == {}
    own.parent.mkdir()
    append_vote(own, vote(pair(1)))
    append_vote(other, vote(pair(2)))
    assert planned(tmp_path) == {VOTES: own}
    assert planned(tmp_path, votes=str(other)) == {VOTES: other}
    assert planned(tmp_path, kind=JudgeKind.metric) == {}
    with pytest.raises(DataError, match=r"stages\.evaluate\.judge\.votes: no file .*none\.jsonl"):
        planned(tmp_path, votes=str(tmp_path / "none.jsonl"))
    own.write_text("not a vote\n")
    with pytest.raises(DataError, match=r"votes\.jsonl:1: not JSON"):
        planned(tmp_path)
    stage = context(tmp_path, [vote(pair(number)) for number in NUMBERS])
    append_vote(tmp_path / FILE, vote(pair(1), annotator="bo"))
    with pytest.raises(StageError, match="the votes have changed since the run was planned"):
        judged(stage)


def test_votes_on_these_very_answers_count(tmp_path: Path) -> None:
    """The first of several; in whatever order the pair is named. Without any, nothing is concluded."""
    nothing = judged(context(tmp_path / "none", []))
    assert (nothing.lines, nothing.win_rate(DPO, reference=SFT)) == ([], None)
    assert "(people judged 0 of 12 prompts, but 10 are needed)" in sentence(nothing)
    stage = context(tmp_path, [vote(pair(number)) for number in NUMBERS])
    others = judged(stage, dpo=answered([f"Now {number}." for number in NUMBERS]))
    assert (others.table.pairs[0].wins, others.table.pairs[0].win_rate) == (0, None)
    assert "0 of 12 prompts, but 10 are needed; 12 votes are for other answers" in sentence(others)
    sft, dpo = (
        answered([text for number in NUMBERS for text in (pair(number).answers[arm], "more")], per_prompt=2)
        for arm in ARMS
    )
    reverse = replace(BY_PEOPLE, pairs=[PairConfig(arm=SFT, against=DPO)])
    for config, counts in ((BY_PEOPLE, (12, 0)), (reverse, (0, 12))):
        table = judged(stage, config, sft=sft, dpo=dpo).table
        assert (table.pairs[0].wins, table.pairs[0].losses) == counts
