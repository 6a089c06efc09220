"""Scorers behind HTTP, asked through the real client: what is sent, retried and kept, never a score nobody gave."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.config.evaluating import ScorerEndpointConfig, ScorerGraderConfig
from alignment.config.scoring import ServerApi, ServerConfig
from alignment.core.errors import ConfigError, RewardError
from alignment.data.records import Prompt
from alignment.data.turns import Message
from alignment.evaluation.endpoint import GIVE_UP, SavedReplies
from alignment.evaluation.endpoint_client import NoReply
from alignment.rewards.scorers import Answers
from alignment.rewards.served import Asking, GradeScorer, ServerScorer
from alignment.rewards.server_apis import APIS, Item
from tests.documented.blocks import blocks
from tests.judge_server import Answering, Response, Served, listening, serving
from tests.unit.rewards.conftest import answers_to, prompt

SCORES, POOLING, CLASSIFY, PAIRS, TEI = (
    ServerApi.scores, ServerApi.vllm_pooling, ServerApi.vllm_classify, ServerApi.vllm_score, ServerApi.tei_predict
)  # fmt: skip
CLASSES = [{"index": n, "label": "x", "probs": [0.9 - n / 10, 0.1 + n / 10], "num_classes": 2} for n in range(2)]
NAMED_CLASSES = [[{"label": "bad", "score": 0.7}, {"label": "good", "score": 0.3}], [{"label": "good", "score": 1.0}]]
TURNS = Prompt(
    messages=(Message(role="system", content="Be short."), Message(role="user", content="Hi.")),
    row={"id": "a", "facts": ["x"]},
    where="rows.jsonl:7",
)
ITEMS = [Item(prompt=TURNS, answer="Hello."), Item(prompt=prompt("2 + 2?"), answer="4.")]
ASKED = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi."}]


def config_of(api: ServerApi, label: str | None = None) -> ServerConfig:
    return ServerConfig(base_url="http://localhost:1", api=api, model="judge-7b", label=label)


def body_of(api: ServerApi, items: Sequence[Item] = ITEMS, label: str | None = None) -> dict[str, Any]:
    return APIS[api].body(config_of(api, label), items)


def read(api: ServerApi, reply: Any, count: int = 2, label: str | None = None) -> list[Any]:
    return APIS[api].read(config_of(api, label), reply, count)


def test_our_own_form_has_conversations_answers_and_rows() -> None:
    row = {"messages": [{"role": "user", "content": "2 + 2?"}]}
    assert body_of(SCORES) == {
        "model": "judge-7b",
        "items": [
            {"id": 0, "messages": ASKED, "answer": "Hello.", "row": {"id": "a", "facts": ["x"]}},
            {"id": 1, "messages": row["messages"], "answer": "4.", "row": row},
        ],
    }


@pytest.mark.parametrize(
    ("api", "label", "sent"),
    [
        (CLASSIFY, None, {"model": "judge-7b", "input": ["Hello.", "4."], "use_activation": False}),
        (CLASSIFY, "1", {"use_activation": True}),
        (PAIRS, None, {"text_1": ["Be short.\n\nHi.", "2 + 2?"], "text_2": ["Hello.", "4."]}),
        (TEI, None, {"inputs": [["Hello."], ["4."]], "raw_scores": True, "truncate": False}),
        (TEI, "good", {"raw_scores": False}),
    ],
)
def test_each_kind_of_server_is_sent_its_own_form(api: ServerApi, label: str | None, sent: dict[str, Any]) -> None:
    body = body_of(api, label=label)
    assert {name: body[name] for name in sent} == sent


@pytest.mark.parametrize(
    ("api", "label", "reply", "scores"),
    [
        (SCORES, None, {"scores": [{"id": 0, "score": 1.5}, {"id": 1, "score": -2}]}, [1.5, -2]),
        (POOLING, None, {"object": "list", "data": [{"index": 0, "object": "pooling", "data": [0.25]}]}, [0.25]),
        (CLASSIFY, "1", {"data": CLASSES}, [0.1, 0.2]),
        (PAIRS, None, {"data": [{"index": n, "object": "score", "score": 0.5 + n} for n in range(2)]}, [0.5, 1.5]),
        (TEI, "good", NAMED_CLASSES, [0.3, 1.0]),
        (TEI, None, [[{"label": "LABEL_0", "score": -4.5}]], [-4.5]),
    ],
)
def test_the_reply_of_each_kind_of_server_is_read(
    api: ServerApi, label: str | None, reply: Any, scores: list[float]
) -> None:
    assert read(api, reply, len(scores), label) == scores


def test_vllm_pools_one_conversation_by_its_own_template_and_tools_are_sent_with_conversations() -> None:
    assert APIS[POOLING].single
    tool = {"type": "function", "function": {"name": "calendar"}}
    with_tool = Item(prompt=replace(TURNS, tools=(tool,)), answer="Hello.")
    pooled, without = body_of(POOLING, [with_tool]), body_of(POOLING, ITEMS[:1])
    assert pooled["messages"] == without["messages"] == [*ASKED, {"role": "assistant", "content": "Hello."}]
    assert (pooled["model"], pooled["add_generation_prompt"], pooled["use_activation"]) == ("judge-7b", False, False)
    assert pooled["chat_template_kwargs"] == {"tools": [tool]}
    assert "chat_template_kwargs" not in without
    ours = body_of(SCORES, [with_tool, ITEMS[1]])["items"]
    assert [item.get("tools") for item in ours] == [[tool], None]


def test_values_that_json_lacks_are_texts_and_the_documented_request_is_sent() -> None:
    """NaN is no JSON, and OpenAI's client refuses it."""
    row = {"id": 1, "score": math.nan, "day": date(2026, 11, 29), "limits": [-math.inf, math.inf, 0.5]}
    sent = Item(prompt=replace(TURNS, row=row), answer="Hello.").row
    assert sent == {"id": 1, "score": "NaN", "day": "2026-11-29", "limits": ["-Infinity", "Infinity", 0.5]}
    json.dumps(sent, allow_nan=False)
    page = Path(__file__).parents[3] / "docs/rewards.md"
    (shown,) = [block.text for block in blocks(page) if block.text.startswith("POST ")]
    path, request, reply = re.fullmatch(r"POST (\S+)\s+({.*})\s+→\s+({.*})\s+", shown, re.DOTALL).groups()  # type: ignore[union-attr]
    request, reply = (re.sub(r", …(?=])", "", text.replace("{…}", "{}")) for text in (request, reply))
    item = Item(prompt=replace(prompt("2 + 2?"), row={}), answer="4.")
    assert path == APIS[SCORES].path
    assert json.loads(request) == APIS[SCORES].body(replace(config_of(SCORES), model="my-org/reward-model"), [item])
    assert read(SCORES, json.loads(reply), 1) == [1.5]


def test_answers_are_scored_in_batches_at_once_in_order_and_equal_ones_are_asked_once(tmp_path: Path) -> None:
    texts = ["x" * (n % 5 + 1) + str(n) for n in range(11)]
    together, sizes = threading.Barrier(3), []

    def answering(body: dict[str, Any], number: int) -> Response:
        if number < 3:
            together.wait(10)  # all three calls are under way
        sizes.append(len(body["items"]))
        return length_scores(body)

    progress: list[int] = []
    with listening(answering) as served:
        asked = asking(tmp_path, progress=lambda: progress.append(1))
        scorer = ServerScorer(settings(served.url, concurrency=3), FIELD, asked)
        scores = scorer.scores(answers(texts))
        assert (scores.dtype, scores.tolist()) == (torch.float64, [len(text) / 2 for text in texts])
        assert (sorted(sizes), len(progress)) == ([3, 4, 4], 3)
        same, other = prompt("Same?"), prompt("Other?")
        assert scorer.scores(answers_to([same, same, other], ["aa", "aa", "aa"])).tolist() == [1.0] * 3
        scorer.scores(answers_to([other, same], ["aa", "aa"]))
    assert sizes[3:] == [2]
    assert served.paths == ["/v1/scores"] * 4
    assert {request["model"] for request in served.requests} == {"rm"}


def entries_of(*indices: object) -> dict[str, Any]:
    return {"data": [{"index": index, "score": 0.5, "probs": [0.5], "data": [0.5]} for index in indices]}


REFUSED: list[tuple[ServerApi, Any, str | None, str]] = [
    (SCORES, {"scores": [{"id": 1, "score": 1}, {"id": 0, "score": 2}]}, None, r"order.*\[1, 0\]"),
    (SCORES, {"scores": [{"id": False, "score": 1}, {"id": True, "score": 2}]}, None, "order"),
    (SCORES, {"scores": [{"id": 0, "score": 1}]}, None, "1 scores for 2 answers"),
    (SCORES, {"scores": [{"id": 0}, {"id": 1, "score": 2}]}, None, "no 'score' in"),
    (SCORES, {"scores": {"0": 1.0, "1": 2.0}}, None, "not a list"),
    (PAIRS, entries_of(1, 0), None, "order"),
    (PAIRS, entries_of(0, 1, 2), None, "3 scores for 2 answers"),
    (CLASSIFY, entries_of(0, 1), "1", "no class 1; it has 1"),
    (CLASSIFY, {"data": [{"index": n, "probs": [0.5, 0.5]} for n in range(2)]}, None, "2 numbers"),
    (TEI, [[{"label": "a", "score": 1.0}]], None, "1 scores for 2 answers"),
    (TEI, [[{"label": "a", "score": 1.0}]] * 2, "b", "no class 'b'; it has 'a'"),
    (TEI, [[{"label": ["a"], "score": 1.0}]] * 2, "a", "not text"),
    (TEI, {"error": "overloaded"}, None, "not a list"),
]


@pytest.mark.parametrize(("api", "reply", "label", "words"), REFUSED)
def test_a_reply_of_another_form_is_no_score(api: ServerApi, reply: Any, label: str | None, words: str) -> None:
    with pytest.raises(NoReply, match=words):
        read(api, reply, label=label)


FIELD = "scorers[0]"


def length_scores(body: dict[str, Any], _: int = 0) -> Response:
    scores = [{"id": item["id"], "score": len(item["answer"]) / 2} for item in body["items"]]
    return Response(body=json.dumps({"scores": scores}))


def asking(folder: Path, *, rank: int = 0, progress: Callable[[], None] = lambda: None) -> Asking:
    files = folder / "replies"
    replies = SavedReplies(files / f"{rank}.jsonl", sorted(files.glob("*.jsonl")))
    return Asking(replies=replies, where="stages.ppo", progress=progress)


def settings(url: str, **changes: Any) -> ServerConfig:
    defaults = {"base_url": url, "model": "rm", "timeout": 5.0, "retries": 1, "concurrency": 1, "batch_size": 4}
    return ServerConfig(**(defaults | changes))


def answers(texts: Sequence[str], start: int = 0) -> Answers:
    return answers_to([prompt(f"Question {start + n}?", line=start + n + 1) for n in range(len(texts))], texts)


def ask(folder: Path, served: Served, texts: Sequence[str], *, rank: int = 0, **changes: Any) -> list[float]:
    scorer = ServerScorer(settings(served.url, **changes), FIELD, asking(folder, rank=rank))
    values: list[float] = scorer.scores(answers(texts)).tolist()
    return values


def failing(folder: Path, answering: Answering, texts: Sequence[str] = ("a", "b"), **changes: Any) -> RewardError:
    with listening(answering) as served, pytest.raises(RewardError) as caught:
        ask(folder, served, texts, **changes)
    return caught.value


def saved(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted((folder / "replies").glob("*.jsonl")))


def test_a_call_that_fails_ends_the_stage_by_name_and_the_other_scores_are_kept(tmp_path: Path) -> None:
    texts, up = [f"text {n}" for n in range(10)], False

    def answering(body: dict[str, Any], number: int) -> Response:
        broken = any(item["answer"] == "text 5" for item in body["items"])
        return Response(status=500, body="{}") if (broken or number == 0) and not up else length_scores(body)

    with listening(answering) as served:
        with pytest.raises(RewardError) as caught:
            ask(tmp_path, served, texts)
        assert caught.value.exit_code == 9
        assert caught.value.where == "stages.ppo.scorers[0].server"
        assert f"1 of 3 calls to the reward server at {served.url} failed" in caught.value.message
        assert "InternalServerError" in caught.value.message
        assert "stages.ppo.scorers[0].server.timeout" in caught.value.remedy
        assert len(served.requests) == 5, "a retry of two calls, one of which then succeeds, and the other"
        up = True
        assert ask(tmp_path, served, texts, batch_size=16) == [3.0] * 10
    assert [item["answer"] for item in served.requests[-1]["items"]] == texts[4:8], "the failed call's answers alone"


def test_a_server_that_is_down_or_never_answers_is_given_up(tmp_path: Path) -> None:
    scorer = ServerScorer(settings("http://127.0.0.1:9", retries=0, batch_size=1), FIELD, asking(tmp_path))
    with pytest.raises(RewardError, match=rf"{GIVE_UP} of {GIVE_UP} calls.*APIConnectionError"):
        scorer.scores(answers([f"text {n}" for n in range(50)]))
    assert "timed out" in failing(tmp_path, lambda *_: None, timeout=0.1, retries=0).message.lower()
    assert not saved(tmp_path)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        *(
            (f'{{"scores": [{{"id": 0, "score": 1.0}}, {{"id": 1, "score": {score}}}]}}', words)
            for score, words in (
                ("NaN", "nan for an answer to rows.jsonl:2,"),
                ("-2e6", "-2000000.0 for an answer to rows.jsonl:2,"),
                ("null", "None (NoneType) for an answer to rows.jsonl:2,"),
                ('"3"', "'3' (str)"),
            )
        ),
        ('{"scores": [{"id": 1, "score": 1.0}, {"id": 0, "score": 2.0}]}', "order"),
        ("<html>It works!</html>", ""),
        pytest.param("[" * 100_000 + "]" * 100_000, "nested too deeply", id="nested deeply"),
    ],
)
def test_what_is_no_score_is_refused_with_its_row_and_kept_nowhere(tmp_path: Path, body: str, words: str) -> None:
    message = failing(tmp_path, lambda *_: Response(body=body)).message
    assert "1 of 1 calls to the reward server" in message
    assert words in message
    assert not saved(tmp_path)


def test_every_process_writes_a_file_and_reads_all_and_a_line_that_was_cut_off_costs_one_call(tmp_path: Path) -> None:
    texts, expected = ["a", "bb", "ccc"], [0.5, 1.0, 1.5]
    with listening(length_scores) as served:
        ask(tmp_path, served, texts[:2], rank=1)
        assert ask(tmp_path, served, texts) == expected
        first, second = sorted((tmp_path / "replies").iterdir())
        assert (first.name, second.name) == ("0.jsonl", "1.jsonl")
        second.write_text(second.read_text()[:-5])
        assert ask(tmp_path, served, texts) == ask(tmp_path, served, texts) == expected
    assert [[item["answer"] for item in request["items"]] for request in served.requests] == [
        ["a", "bb"], ["ccc"], ["bb"],
    ]  # fmt: skip


def test_a_grade_is_the_score_and_is_asked_for_with_rubric_reference_and_tools(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "calendar"}}
    prompts = [prompt("Who?", line=1, reference="Ada."), replace(prompt("Where?", line=2), tools=(tool,))]
    answered = answers_to(prompts, ["Ada did.", "Here."])
    rubric: dict[str, Any] = {"rubric": "Be right.", "lowest": 1, "highest": 5, "show_reference": True}
    progress: list[int] = []
    with serving(lambda text, _: Response(text="Good.\n[[4]]" if "Ada did" in text else "Bad.\n[[1]]")) as served:
        asked = asking(tmp_path, progress=lambda: progress.append(1))
        assert GradeScorer(grader(served.url, **rubric), FIELD, asked).scores(answered).tolist() == [4.0, 1.0]
    again = GradeScorer(grader("http://127.0.0.1:9/v1", **rubric), FIELD, asking(tmp_path))
    assert again.scores(answered).tolist() == [4.0, 1.0], "kept, whatever the address"
    texts = [request["messages"][0]["content"] for request in served.requests]
    assert len(texts) == len(progress) == 2
    assert all("Be right." in text for text in texts)
    assert [sum(words in text for text in texts) for words in ("Ada.", '{"name": "calendar"}')] == [1, 1]


def test_the_key_comes_from_its_variable_and_stands_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCORER_KEY", "sk-canary-123")
    with listening(length_scores) as served:
        ask(tmp_path, served, ["a"], api_key_env="SCORER_KEY")
    assert served.keys == ["Bearer sk-canary-123"]
    assert "canary" not in saved(tmp_path)
    refused = Response(status=401, body=json.dumps({"error": {"message": "wrong key:" + " sk-canary-123" * 40}}))
    message = failing(tmp_path, lambda *_: refused, ["b"], api_key_env="SCORER_KEY").message
    assert "wrong key: ***" in message
    assert "canary" not in message
    quoted = Response(body=json.dumps({"error": "the key is bad:" + " sk-canary-123" * 40}))  # of which a part is shown
    assert "canary" not in failing(tmp_path, lambda *_: quoted, ["b"], api_key_env="SCORER_KEY").message
    monkeypatch.delenv("SCORER_KEY")
    with pytest.raises(ConfigError, match="variable SCORER_KEY is not set") as caught:
        ServerScorer(settings(served.url, api_key_env="SCORER_KEY"), FIELD, asking(tmp_path))
    assert caught.value.where == "stages.ppo.scorers[0].server.api_key_env"


def test_what_was_scored_is_asked_again_only_if_what_counts_has_changed(tmp_path: Path) -> None:
    texts = ["a", "bb", "ccc"]
    with listening(length_scores) as first:
        expected = ask(tmp_path, first, texts)
    with listening(lambda body, _: length_scores(body)) as again:
        how = {"batch_size": 1, "concurrency": 7, "timeout": 9.0, "retries": 0}
        assert ask(tmp_path, again, texts, **how) == expected, "another address, and other ways to call it"
        assert not again.requests
        ask(tmp_path, again, texts, model="other")
        assert len(again.requests) == 1
        ask(tmp_path, again, ["a", "bb", "cccc"])
        assert [item["answer"] for item in again.requests[-1]["items"]] == ["cccc"]
        scorer = ServerScorer(settings(again.url), FIELD, asking(tmp_path))
        scorer.scores(answers(["a"], start=100))
        assert again.requests[-1]["items"][0]["messages"][0]["content"] == "Question 100?"


def grader(url: str, **changes: Any) -> ScorerGraderConfig:
    endpoint = ScorerEndpointConfig(base_url=url, model="m", timeout=5.0, retries=0, concurrency=2)
    return ScorerGraderConfig(endpoint=endpoint, **changes)


def test_a_reply_without_a_grade_ends_the_stage_unless_its_score_is_set(tmp_path: Path) -> None:
    with serving(lambda text, _: Response(text="[[7]]" if "bb" in text else "I like it.")) as served:
        with pytest.raises(RewardError) as caught:
            GradeScorer(grader(served.url), FIELD, asking(tmp_path)).scores(answers(["bb", "a"]))
        assert caught.value.where == "grade by m"
        assert "rows.jsonl:2; its reply ends with 'I like it.'" in caught.value.message
        assert "stages.ppo.scorers[0].grader.ungraded" in caught.value.remedy
        lenient = GradeScorer(grader(served.url, ungraded=-3.0), FIELD, asking(tmp_path))
        assert lenient.scores(answers(["bb", "a"])).tolist() == [7.0, -3.0]
    assert len(served.requests) == 2, "its reply is kept all the same"
    with serving(lambda *_: Response(status=400, body="{}")) as served, pytest.raises(RewardError) as caught:
        GradeScorer(grader(served.url, ungraded=0.0), FIELD, asking(tmp_path)).scores(answers(["c"]))
    assert caught.value.exit_code == 9
    assert f"1 of 1 calls to the grader at {served.url} failed" in caught.value.message
    assert caught.value.where == "stages.ppo.scorers[0].grader.endpoint"
