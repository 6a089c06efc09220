"""Judges of every kind held against pairs that people have labelled, on tiny models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment import worker
from alignment.config.data import DataConfig
from alignment.config.evaluating import ChatEndpointConfig, JudgeConfig, JudgeKind, LabelledConfig, PairConfig
from alignment.config.grader import GraderConfig
from alignment.config.reward_server import ServerConfig
from alignment.config.scoring import MetricConfig
from alignment.core.errors import DataError
from alignment.data.tokens.tokenize import answer_ids, prompt_ids
from alignment.data.turns import Message
from alignment.job import StageInput, StageSpec
from alignment.models.assembly.reward_head import load_reward_model
from alignment.records.evaluation import Evaluation, JudgedPair
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.training.context import StageContext
from tests.chained import LORA, Chained
from tests.judge_server import Response, listening, serving
from tests.tiny import tiny_tokenizer

NUMBER = 12
PAIRS = [
    {
        "id": f"p{number}",
        "prompt": f"Room {number}: when is it open?",
        "chosen": f"On day {number}.",
        "rejected": "I would rather not say when it is open.",
    }
    for number in range(NUMBER)
]
SETTINGS = LabelledConfig(data=DataConfig(source="path:labelled.jsonl"), max_prompts=50)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chained:
    chain = Chained(tmp_path_factory.mktemp("labelled"))
    chain.run("sft", LORA)
    chain.run("reward", LORA, init="sft")
    (chain.folder / "heldout.jsonl").write_text(json.dumps({"prompt": "When is it open?", "reference": "Now."}) + "\n")
    again = [PAIRS[0] | {"chosen": "Daily."}]
    (chain.folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*PAIRS, *again]))
    return chain


def config_of(judge: JudgeConfig, **changes: Any) -> EvaluateConfig:
    return EvaluateConfig(
        arms=["base", "stage:sft"],
        max_new_tokens=2,
        bootstrap_samples=200,
        judge=replace(judge, pairs=[PairConfig(arm="stage:sft", against="base")], labelled=SETTINGS),
        **({"metrics": [MetricConfig(name="short", source="length", target=3)], "reward": None} | changes),
    )


def spec_of(chain: Chained, config: EvaluateConfig, fingerprint: str) -> StageSpec:
    artifact = chain.folder / "artifacts" / f"evaluate-{fingerprint}"
    run_folder = chain.folder / "runs" / fingerprint
    run_folder.mkdir(parents=True, exist_ok=True)
    inputs = {"reference": chain.inputs["sft"]} | ({"reward": chain.inputs["reward"]} if config.reward else {})
    return replace(
        chain.spec("sft", LORA, config=config),
        stage="evaluate",
        inputs=inputs,
        arms={
            "base": StageInput(ref="base", path=None),
            "stage:sft": StageInput(ref="stage:sft", path=chain.inputs["sft"].path),
        },
        data_path=chain.folder / "heldout.jsonl",
        extra_data={"judge.labelled.data": chain.folder / "labelled.jsonl"},
        artifact=artifact,
        work=artifact.with_name(f"{artifact.name}.work"),
        run_folder=run_folder,
    )


def evaluate(chain: Chained, config: EvaluateConfig, fingerprint: str) -> tuple[JudgedPair, Evaluation]:
    spec = spec_of(chain, config, fingerprint)
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    evaluation = Evaluation.read(spec.artifact)
    assert evaluation.judge is not None
    assert evaluation.judge.labelled is not None
    return evaluation.judge.labelled, evaluation


def lines(chain: Chained, fingerprint: str) -> list[dict[str, Any]]:
    file = chain.folder / "artifacts" / f"evaluate-{fingerprint}" / "labelled_judgements.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def first_shown(prompt: str) -> str:
    return prompt.partition("<<<answer A>>>\n")[2].partition("\n<<<end of answer A>>>")[0]


def by_endpoint(chain: Chained, reply: Any, name: str) -> tuple[JudgedPair, Evaluation, list[str]]:
    asked: list[str] = []

    def judge(prompt: str, number: int) -> Response:
        asked.append(prompt)
        return Response(text=reply(prompt, number))

    with serving(judge) as served:
        config = config_of(JudgeConfig(kind=JudgeKind.endpoint, endpoint=served.config()))
        labelled, evaluation = evaluate(chain, config, name)
    return labelled, evaluation, [prompt for prompt in asked if "Room" in prompt]


def test_a_judge_that_people_would_agree_with(chain: Chained) -> None:
    labelled, evaluation, asked = by_endpoint(
        chain, lambda prompt, _: "[[A]]" if "On day" in first_shown(prompt) else "[[B]]", "right"
    )
    assert len(asked) == 2 * NUMBER, "both orders, and one pair of each prompt"
    assert (labelled.wins, labelled.ties, labelled.losses, labelled.prompts) == (NUMBER, 0, 0, NUMBER)
    assert labelled.win_rate is not None
    assert labelled.win_rate.mean == 1.0
    assert (labelled.agreement, labelled.position_bias) == (1.0, 0.0)
    assert any("agrees with people on 100% of 12 pairs" in sentence for sentence in evaluation.conclusions)
    recorded = lines(chain, "right")
    assert [line["shown_first"] for line in recorded] == ["chosen", "rejected"] * NUMBER
    assert {line["id"] for line in recorded} == {row["id"] for row in PAIRS}
    assert evaluation.judge is not None
    assert [pair.arm for pair in evaluation.judge.pairs] == ["stage:sft"]


def test_a_judge_sees_the_tools_of_labelled_pairs(chain: Chained, tmp_path: Path) -> None:
    rows = [row | {"tools": [{"name": "opening_hours"}]} for row in PAIRS]
    (tmp_path / "tools.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(lambda *_: Response(text="[[A]]")) as served:
        config = config_of(JudgeConfig(kind=JudgeKind.endpoint, endpoint=served.config()))
        spec = replace(spec_of(chain, config, "shown"), extra_data={"judge.labelled.data": tmp_path / "tools.jsonl"})
        worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
        prompts = [request["messages"][0]["content"] for request in served.requests]
    shown = ['{"name": "opening_hours"}' in prompt for prompt in prompts if "Room" in prompt]
    assert shown == [True] * 2 * NUMBER


def test_a_judge_that_looks_at_the_position_alone_is_no_better_than_chance(chain: Chained) -> None:
    labelled, evaluation, _ = by_endpoint(chain, lambda *_: "[[A]]", "first")
    assert (labelled.ties, labelled.position_bias) == (NUMBER, 1.0)
    assert any(
        "which cannot be distinguished from chance: its win rates say nothing" in line
        for line in evaluation.conclusions
    )


def test_a_judge_without_verdicts_is_not_judged(chain: Chained) -> None:
    labelled, evaluation, _ = by_endpoint(chain, lambda prompt, _: prompt, "invalid")
    assert labelled.win_rate is None
    assert labelled.invalid == 1.0
    assert any("100% of its verdicts on 12 labelled pairs are invalid" in line for line in evaluation.conclusions)


@pytest.mark.parametrize(("higher", "wins"), [(True, NUMBER), (False, 0)])
def test_a_metric_judges_labelled_pairs_in_its_own_direction(chain: Chained, higher: bool, wins: int) -> None:
    """The chosen answers have three words, as the metric wants."""
    metrics = [MetricConfig(name="short", source="length", target=3, higher_is_better=higher)]
    name = f"metric-{wins}"
    labelled, _ = evaluate(chain, config_of(JudgeConfig(kind=JudgeKind.metric), metrics=metrics), name)
    assert (labelled.wins, labelled.losses) == (wins, NUMBER - wins)
    assert labelled.agreement is None
    assert all((line["chosen_score"], line["rejected_score"]) == (1.0, 0.0) for line in lines(chain, name))


def test_a_grader_judges_labelled_pairs_and_a_missing_grade_is_no_verdict(chain: Chained) -> None:
    def grade(prompt: str, _: int) -> Response:
        if "Room 3:" in prompt:
            return Response(text="no grade")
        return Response(text="[[9]]" if "On day" in prompt else "[[4]]")

    with serving(grade) as served:
        endpoint = ChatEndpointConfig(base_url=served.url, model="grader", retries=0, concurrency=1)
        config = config_of(
            JudgeConfig(kind=JudgeKind.metric),
            metrics=[MetricConfig(name="helpful", source="grade")],
            grader=GraderConfig(endpoint=endpoint),
        )
        labelled, _ = evaluate(chain, config, "graded")
    assert (labelled.wins, labelled.ties, labelled.losses) == (NUMBER - 1, 0, 0)
    assert labelled.invalid == pytest.approx(1 / NUMBER)


def test_a_server_judges_labelled_pairs(chain: Chained) -> None:
    def by_length(body: dict[str, Any], _: int) -> Response:
        scores = [{"id": item["id"], "score": -float(len(item["answer"]))} for item in body["items"]]
        return Response(body=json.dumps({"scores": scores}))

    with listening(by_length) as served:
        server = ServerConfig(base_url=served.url, model="length", retries=0, concurrency=1)
        metrics = [MetricConfig(name="brief", source="server", server=server)]
        labelled, _ = evaluate(chain, config_of(JudgeConfig(kind=JudgeKind.metric), metrics=metrics), "server")
    assert (labelled.wins, labelled.losses) == (NUMBER, 0)
    assert [line["chosen_score"] for line in lines(chain, "server")] == [-len(row["chosen"]) for row in PAIRS]


def test_a_reward_model_judges_labelled_pairs_by_its_scores(chain: Chained) -> None:
    config = config_of(JudgeConfig(kind=JudgeKind.reward), reward="stage:reward")
    labelled, _ = evaluate(chain, config, "reward")
    model = load_reward_model(chain.spec("sft", LORA), chain.inputs["reward"], device=torch.device("cpu"))
    tokenizer, wins = tiny_tokenizer(), 0
    for row, line in zip(PAIRS, lines(chain, "reward"), strict=True):
        messages = [Message(role="user", content=row["prompt"])]
        scores = []
        for answer in ("chosen", "rejected"):
            ids = [*prompt_ids(tokenizer, messages), *answer_ids(tokenizer, messages, row[answer])]
            tensor = torch.tensor([ids])
            scores.append(float(model(input_ids=tensor, attention_mask=torch.ones_like(tensor)).logits))
        assert [line["chosen_score"], line["rejected_score"]] == pytest.approx(scores, abs=1e-4)
        wins += scores[0] > scores[1]
    assert labelled.wins == wins


def test_labelled_pairs_are_scored_with_their_tools(chain: Chained, tmp_path: Path) -> None:
    """The tiny template leaves them out, which is refused."""
    rows = [row | {"tools": [{"name": "opening_hours"}]} for row in PAIRS]
    (tmp_path / "tools.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(JudgeConfig(kind=JudgeKind.reward), reward="stage:reward")
    spec = replace(spec_of(chain, config, "tools"), extra_data={"judge.labelled.data": tmp_path / "tools.jsonl"})
    with pytest.raises(DataError, match=r"tools\.jsonl:\d+: the chat template leaves out the tool 'opening_hours'"):
        worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))


def test_at_most_so_many_prompts_are_drawn_and_other_rows_are_refused(chain: Chained, tmp_path: Path) -> None:
    config = config_of(JudgeConfig(kind=JudgeKind.metric))
    few = replace(config, judge=replace(config.judge, labelled=replace(SETTINGS, max_prompts=5)))
    assert evaluate(chain, few, "few")[0].prompts == 5
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}\n')
    spec = replace(spec_of(chain, config, "bad"), extra_data={"judge.labelled.data": tmp_path / "prompts.jsonl"})
    with pytest.raises(DataError, match="'chosen' is missing"):
        worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
