"""Grades of a language model as metrics of an evaluation: whose they are, and what a missing one means."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from alignment.config.evaluating import AnswersConfig, ChatEndpointConfig, JudgeConfig, JudgeKind, PairConfig
from alignment.config.grader import GraderConfig
from alignment.config.reward_server import ServerApi, ServerConfig
from alignment.config.scoring import MetricConfig
from alignment.core.errors import ConfigError, StageError
from alignment.evaluation import arms
from alignment.models.assembly.load import Lineage
from alignment.records.evaluation import Evaluation, Sample, read_samples
from alignment.stages.evaluate import answering
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.evaluate.grading import settled
from alignment.stages.shared import arm_policies
from tests.chained import Chained
from tests.evaluating import evaluation_chain, evaluation_of, read_lines, write_rows
from tests.judge_server import Judge, Response, Served, listening, serving
from tests.tiny import tiny_tokenizer

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
    assert near is not None
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
    assert evaluation.judge is not None
    (pair,) = evaluation.judge.pairs
    assert (pair.wins, pair.ties, pair.losses, pair.prompts) == (4, 0, 0, 4)
    assert any("helpful covers 4 of 5 prompts; on the others" in sentence for sentence in evaluation.conclusions)
    assert evaluation.conclusions[0].startswith("4 prompts, by helpful: ")


@pytest.mark.parametrize(
    ("rows", "grades", "max_invalid", "counted", "left_out"),
    [
        (
            [0, 1, 2, 3],
            {"a": [1, None, 3, 4], "b": [5, 6, 7, 8]},
            0.25,
            {"a": [1, None, 3, 4], "b": [5, None, 7, 8]},
            [],
        ),
        ([0, 1, 2, 3], {"a": [1, None, None, 4], "b": [5, 6, 7, 8]}, 0.25, {"b": [5, 6, 7, 8]}, ["a"]),
        ([0, 1], {"a": [None, None], "b": [None, 6]}, 0.25, {}, ["a", "b"]),
        ([0, 1], {"a": [1, None], "b": [None, 6]}, 0.5, {}, ["a", "b"]),
        ([0, 0, 1, 1, 2], {"a": [1, None, 3, 4, 5]}, 0.2, {"a": [None, None, 3, 4, 5]}, []),
    ],
    ids=["prompt", "arm", "all arms", "every prompt in some arm", "turn"],
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


def test_a_server_scores_beside_the_grader(chain: Chained) -> None:
    def scores(body: dict[str, Any], _: int) -> Response:
        return Response(body=json.dumps([[{"label": "LABEL_0", "score": len(text)}] for (text,) in body["inputs"]]))

    with listening(scores) as server:
        settings = ServerConfig(base_url=server.url, api=ServerApi.tei_predict, model="length", retries=0)
        length = MetricConfig(name="length", source="server", server=settings)
        evaluation, samples, _ = evaluate(chain, fair, "served", replace(CONFIG, metrics=[*GRADED, length]))
    for arm in evaluation.arms:
        answers = [sample.answers[arm.name] for sample in samples]
        texts = [[turn.text for turn in answer.turns] or [answer.text] for answer in answers]
        means = [sum(map(len, turns)) / len(turns) for turns in texts]
        assert arm.metrics["length"].mean == pytest.approx(sum(means) / len(means))
    assert evaluation.primary == "helpful"
    assert set(server.paths) == {"/v1/predict"}


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
    monkeypatch.setattr(arm_policies, "load_policy", loads.append)
    endpoint = ChatEndpointConfig(base_url="http://127.0.0.1:9/v1", model="m", api_key_env="GRADER_KEY")
    with pytest.raises(ConfigError, match="GRADER_KEY is not set") as caught:
        evaluation_of(chain, replace(CONFIG, grader=GraderConfig(endpoint=endpoint)), "key")
    assert caught.value.where == "stages.evaluate.grader.endpoint.api_key_env"
    assert loads == []
