"""Stages other than PPO whose answers a server scores, as the worker runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignment.config.data import DataConfig
from alignment.config.grader import ScorerEndpointConfig, ScorerGraderConfig
from alignment.config.reward_server import ServerConfig
from alignment.config.scoring import Combine, EnsembleConfig, MemberConfig, ScorerConfig
from alignment.core.errors import RewardError
from alignment.data.reading import read_records
from alignment.data.records import PreferencePair
from alignment.stages.sample.config import Select
from tests.judge_server import Response, listening, serving
from tests.oracles import ensembles as oracle
from tests.sampled import lines, sampled

DOWN = Response(status=400, body="{}")


def by_words(body: dict[str, Any], _: int = 0) -> Response:
    """The rule ``length`` with three words, from outside."""
    scores = [{"id": item["id"], "score": word_score(item["answer"])} for item in body["items"]]
    return Response(body=json.dumps({"scores": scores}))


def word_score(text: str) -> float:
    return max(0.0, 1 - abs(len(text.split()) - 3) / 3)


def server(url: str, **changes: Any) -> ServerConfig:
    settings: dict[str, Any] = {"base_url": url, "model": "words", "retries": 0, "concurrency": 1, "batch_size": 5}
    return ServerConfig(**(settings | changes))


def test_a_server_chooses_the_rows_that_the_same_rule_would_and_is_asked_only_for_what_is_missing(
    tmp_path: Path,
) -> None:
    by_rule = sampled(tmp_path / "rule")
    with listening(lambda body, number: by_words(body) if number < 4 else DOWN) as first:
        scorer = ScorerConfig(source="server", server=server(first.url))
        with pytest.raises(RewardError, match="calls to the reward server at"):
            sampled(tmp_path / "served", scorers=[scorer])
    with listening(by_words) as second:
        by_server = sampled(tmp_path / "served", scorers=[ScorerConfig(source="server", server=server(second.url))])
    assert (by_server / "rows.jsonl").read_text() == (by_rule / "rows.jsonl").read_text()
    before = [json.dumps([i["messages"], i["answer"]]) for request in first.requests[:4] for i in request["items"]]
    after = [json.dumps([i["messages"], i["answer"]]) for request in second.requests for i in request["items"]]
    asked = {json.dumps([line["messages"], line["answer"]]) for line in lines(by_server / "samples.jsonl")}
    assert sorted(before + after) == sorted(asked), "each once"


def test_an_ensemble_and_a_grader_choose_rows(tmp_path: Path) -> None:
    def graded(prompt: str, _: int) -> Response:
        answer = prompt.rpartition("<<<answer>>>\n")[2].partition("\n<<<end of answer>>>")[0]
        return Response(text=f"So.\n[[{len(answer) % 10 + 1}]]")

    with serving(graded) as served:
        endpoint = ScorerEndpointConfig(base_url=served.url, model="m", retries=0)
        grade = MemberConfig(source="grade", grader=ScorerGraderConfig(endpoint=endpoint))
        length = MemberConfig(source="length", target=3)
        ensemble = EnsembleConfig(members=[length, grade], combine=Combine.mean_minus_std, std_weight=0.5)
        made = sampled(
            tmp_path,
            scorers=[ScorerConfig(source="ensemble", ensemble=ensemble, weight=2.0)],
            select=Select.best_worst,
        )
    samples = lines(made / "samples.jsonl")
    for line in samples:
        members = [line["scorers"]["ensemble/length"], line["scorers"]["ensemble/grade"]]
        (bound,) = oracle.combined([[member] for member in members], "mean_minus_std", weight=0.5)
        assert line["score"] == pytest.approx(2.0 * bound, rel=1e-5, abs=1e-5)
        assert members[0] == pytest.approx(word_score(line["answer"]), abs=1e-6)
        assert members[1] in range(1, 11)
    pairs = read_records(made / "rows.jsonl", PreferencePair, DataConfig())
    scores = {line["answer"]: line["score"] for line in samples}
    assert all(scores[pair.chosen] > scores[pair.rejected] for pair in pairs)
