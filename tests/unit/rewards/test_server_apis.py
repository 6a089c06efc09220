"""What each kind of server is sent, and which replies of it are scores."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from alignment.config.reward_server import ServerApi, ServerConfig
from alignment.data.records import Prompt
from alignment.data.turns import Message
from alignment.evaluation.endpoint_client import NoReply
from alignment.rewards.server_apis import APIS, Item
from tests.documented.blocks import blocks
from tests.unit.rewards.conftest import prompt

TURNS = Prompt(
    messages=(
        Message(role="system", content="Be short."),
        Message(role="user", content="Hi."),
    ),
    row={"id": "a", "facts": ["x"]},
    where="rows.jsonl:7",
)
ITEMS = [Item(prompt=TURNS, answer="Hello."), Item(prompt=prompt("2 + 2?"), answer="4.")]
ASKED = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi."}]


def config(api: ServerApi, label: str | None = None) -> ServerConfig:
    return ServerConfig(base_url="http://localhost:1", api=api, model="judge-7b", label=label)


def body(api: ServerApi, count: int = 2, label: str | None = None) -> dict[str, Any]:
    return APIS[api].body(config(api, label), ITEMS[:count])


def read(api: ServerApi, reply: Any, count: int = 2, label: str | None = None) -> list[Any]:
    return APIS[api].read(config(api, label), reply, count)


def test_our_own_form_has_conversations_answers_and_rows() -> None:
    sent = body(ServerApi.scores)
    row = {"messages": [{"role": "user", "content": "2 + 2?"}]}
    assert sent == {
        "model": "judge-7b",
        "items": [
            {"id": 0, "messages": ASKED, "answer": "Hello.", "row": {"id": "a", "facts": ["x"]}},
            {"id": 1, "messages": row["messages"], "answer": "4.", "row": row},
        ],
    }
    assert read(ServerApi.scores, {"scores": [{"id": 0, "score": 1.5}, {"id": 1, "score": -2}]}) == [1.5, -2]


def test_values_that_json_lacks_are_sent_as_texts() -> None:
    """NaN is no JSON, and OpenAI's client refuses it."""
    row = {"id": 1, "score": math.nan, "day": date(2026, 11, 29), "limits": [-math.inf, math.inf, 0.5]}
    sent = Item(prompt=replace(TURNS, row=row), answer="Hello.").row
    assert sent == {"id": 1, "score": "NaN", "day": "2026-11-29", "limits": ["-Infinity", "Infinity", 0.5]}
    json.dumps(sent, allow_nan=False)


def test_the_request_in_the_documentation_is_what_is_sent() -> None:
    page = Path(__file__).parents[3] / "docs/rewards.md"
    (shown,) = [block.text for block in blocks(page) if block.text.startswith("POST ")]
    path, request, reply = re.fullmatch(r"POST (\S+)\s+({.*})\s+→\s+({.*})\s+", shown, re.DOTALL).groups()  # type: ignore[union-attr]
    request, reply = (re.sub(r", …(?=])", "", text.replace("{…}", "{}")) for text in (request, reply))
    api = APIS[ServerApi.scores]
    item = Item(prompt=replace(prompt("2 + 2?"), row={}), answer="4.")
    assert path == api.path
    assert json.loads(request) == api.body(replace(config(ServerApi.scores), model="my-org/reward-model"), [item])
    assert read(ServerApi.scores, json.loads(reply), 1) == [1.5]


def test_vllm_pools_one_conversation_by_its_own_template() -> None:
    sent = body(ServerApi.vllm_pooling, 1)
    assert sent["messages"] == [*ASKED, {"role": "assistant", "content": "Hello."}]
    assert (sent["model"], sent["add_generation_prompt"], sent["use_activation"]) == ("judge-7b", False, False)
    assert APIS[ServerApi.vllm_pooling].single
    reply = {"object": "list", "data": [{"index": 0, "object": "pooling", "data": [0.25]}]}
    assert read(ServerApi.vllm_pooling, reply, 1) == [0.25]


def test_the_tools_of_a_prompt_are_sent_where_a_server_reads_conversations() -> None:
    tool = {"type": "function", "function": {"name": "calendar"}}
    with_tool = Item(prompt=replace(TURNS, tools=(tool,)), answer="Hello.")
    ours = APIS[ServerApi.scores].body(config(ServerApi.scores), [with_tool, ITEMS[1]])["items"]
    assert ours[0]["tools"] == [tool]
    assert "tools" not in ours[1]
    pooled = APIS[ServerApi.vllm_pooling].body(config(ServerApi.vllm_pooling), [with_tool])
    assert pooled["chat_template_kwargs"] == {"tools": [tool]}
    assert "chat_template_kwargs" not in body(ServerApi.vllm_pooling, 1)


def test_vllm_classifies_answers_and_a_label_is_the_number_of_a_class() -> None:
    assert body(ServerApi.vllm_classify) == {"model": "judge-7b", "input": ["Hello.", "4."], "use_activation": False}
    assert body(ServerApi.vllm_classify, label="1")["use_activation"] is True
    entries = [{"index": n, "label": "x", "probs": [0.9 - n / 10, 0.1 + n / 10], "num_classes": 2} for n in range(2)]
    assert read(ServerApi.vllm_classify, {"data": entries}, label="1") == [0.1, 0.2]


def test_vllm_scores_pairs_of_a_prompt_and_an_answer() -> None:
    sent = body(ServerApi.vllm_score)
    assert sent["text_1"] == ["Be short.\n\nHi.", "2 + 2?"]
    assert sent["text_2"] == ["Hello.", "4."]
    entries = [{"index": n, "object": "score", "score": 0.5 + n} for n in range(2)]
    assert read(ServerApi.vllm_score, {"data": entries}) == [0.5, 1.5]


def test_text_embeddings_inference_predicts_answers_and_a_label_is_the_name_of_a_class() -> None:
    assert body(ServerApi.tei_predict) == {"inputs": [["Hello."], ["4."]], "raw_scores": True, "truncate": False}
    assert body(ServerApi.tei_predict, label="good")["raw_scores"] is False
    of_classes = [[{"label": "bad", "score": 0.7}, {"label": "good", "score": 0.3}], [{"label": "good", "score": 1.0}]]
    assert read(ServerApi.tei_predict, of_classes, label="good") == [0.3, 1.0]
    assert read(ServerApi.tei_predict, [[{"label": "LABEL_0", "score": -4.5}]], 1) == [-4.5]


def entries(*indices: object) -> dict[str, Any]:
    return {"data": [{"index": index, "score": 0.5, "probs": [0.5], "data": [0.5]} for index in indices]}


REFUSED: list[tuple[ServerApi, Any, str | None, str]] = [
    (
        ServerApi.scores,
        {"scores": [{"id": 1, "score": 1}, {"id": 0, "score": 2}]},
        None,
        r"a different order than the answers.*\[1, 0\]",
    ),
    (
        ServerApi.scores,
        {"scores": [{"id": False, "score": 1}, {"id": True, "score": 2}]},
        None,
        "a different order than the answers",
    ),
    (ServerApi.scores, {"scores": [{"id": 0, "score": 1}]}, None, "returns 1 scores for 2 answers"),
    (ServerApi.scores, {"scores": [{"id": 0}, {"id": 1, "score": 2}]}, None, "no 'score' in"),
    (ServerApi.scores, {"scores": {"0": 1.0, "1": 2.0}}, None, "is not a list"),
    (ServerApi.scores, [1.0, 2.0], None, "no 'scores' in"),
    (ServerApi.vllm_score, entries(1, 0), None, "a different order than the answers"),
    (ServerApi.vllm_score, entries(0, 1, 2), None, "returns 3 scores for 2 answers"),
    (ServerApi.vllm_classify, entries(0, 0), None, "a different order than the answers"),
    (ServerApi.vllm_classify, entries(0, 1), "1", "no class 1; it has 1, numbered from 0"),
    (
        ServerApi.vllm_classify,
        {"data": [{"index": n, "probs": [0.5, 0.5]} for n in range(2)]},
        None,
        "2 numbers for an answer instead of one",
    ),
    (ServerApi.tei_predict, [[{"label": "a", "score": 1.0}]], None, "returns 1 scores for 2 answers"),
    (ServerApi.tei_predict, [[{"label": "a", "score": 1.0}]] * 2, "b", "no class 'b'; it has 'a'"),
    (ServerApi.tei_predict, [[{"label": ["a"], "score": 1.0}]] * 2, "a", "is not text"),
    (ServerApi.tei_predict, [[{"label": "a", "score": 1}, {"label": "b", "score": 1}]] * 2, None, "2 numbers for an"),
    (ServerApi.tei_predict, {"error": "overloaded"}, None, "is not a list"),
    (ServerApi.tei_predict, None, None, "is not a list"),
]


@pytest.mark.parametrize(("api", "reply", "label", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_a_reply_of_another_form_is_no_score(api: ServerApi, reply: Any, label: str | None, words: str) -> None:
    with pytest.raises(NoReply, match=words):
        read(api, reply, label=label)
