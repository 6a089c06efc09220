"""A judge's endpoint through the real client: what is asked, what is tried again, what fails, and what is kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from alignment.config.evaluating import EndpointConfig
from alignment.core.errors import ConfigError, StageError
from alignment.evaluation.endpoint import GIVE_UP, Endpoint, SavedReplies
from tests.judge_server import Judge, Response, serving

pytest.importorskip("openai")

VARIABLES = ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_WEBHOOK_SECRET")
"""What the client reads by itself."""


def ask(config: EndpointConfig, replies_file: Path, prompts: list[str]) -> list[str]:
    endpoint = Endpoint(config, SavedReplies(replies_file), where="stages.evaluate.judge")
    return endpoint.ask(prompts, lambda done: None)


@pytest.fixture
def replies_file(tmp_path: Path) -> Path:
    return tmp_path / "work" / "judgements.work.jsonl"


def failing(judge: Judge, replies_file: Path, *, prompts: int = 2, **changes: Any) -> str:
    """The message about an endpoint that fails, of which no reply is kept."""
    with serving(judge) as served, pytest.raises(StageError) as caught:
        ask(served.config(**changes), replies_file, [f"prompt {number}" for number in range(prompts)])
    assert "stages.evaluate.judge.endpoint" in str(caught.value)
    assert "run again" in str(caught.value)
    assert not replies_file.exists()
    return caught.value.message


def test_every_prompt_is_one_greedy_call_with_a_user_turn(replies_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {name: f"somebody-elses-{name}" for name in VARIABLES}
    others["OPENAI_CUSTOM_HEADERS"] = "X-Team: somebody-elses-team\nAuthorization: Bearer somebody-elses-bearer"
    for name, value in others.items():
        monkeypatch.setenv(name, value)
    done: list[int] = []
    with serving(lambda prompt, _: Response(text=f"so much for {prompt}" if prompt != "c" else "")) as served:
        endpoint = Endpoint(served.config(concurrency=3, max_tokens=7), SavedReplies(replies_file), where="")
        replies = endpoint.ask(["a", "b", "c", "b"], done.append)
    assert replies == ["so much for a", "so much for b", "", "so much for b"]
    assert sorted(done) == [1, 2, 3]
    assert len(served.requests) == 3, "the same prompt is asked once"
    for request in served.requests:
        assert request["model"] == "judge"
        assert request["temperature"] == 0
        assert request["max_tokens"] == 7
        assert [message["role"] for message in request["messages"]] == ["user"]
    assert not any("somebody" in headers for headers in served.headers)
    assert served.keys == ["Bearer none"] * 3
    assert {name: os.environ[name] for name in others} == others, "other code still finds them"


def test_a_key_comes_from_its_variable_and_stands_nowhere_else(
    replies_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="JUDGE_KEY"):
        ask(EndpointConfig(base_url="http://localhost:1/v1", model="m", api_key_env="JUDGE_KEY"), replies_file, ["a"])
    monkeypatch.setenv("JUDGE_KEY", "sk-canary-123")
    refused = Response(status=401, body=json.dumps({"error": {"message": "wrong key:" + " sk-canary-123" * 40}}))
    message = failing(lambda *_: refused, replies_file, api_key_env="JUDGE_KEY")
    assert "wrong key: ***" in message
    assert "canary" not in message
    with serving(lambda prompt, number: Response(text="fine")) as served:
        ask(served.config(api_key_env="JUDGE_KEY"), replies_file, ["a"])
    assert served.keys == ["Bearer sk-canary-123"]
    assert served.headers[0].count("canary") == 1
    assert "canary" not in replies_file.read_text()


def test_one_call_that_fails_after_its_retries_ends_the_stage_and_is_asked_again(replies_file: Path) -> None:
    prompts, up = [f"prompt {number}" for number in range(20)], False

    def judge(prompt: str, number: int) -> Response:
        if prompt == "prompt 3" and not up:
            return Response(status=500, body="{}")
        return Response(text=f"of {prompt}") if number or up else Response(status=429, body="{}")

    with serving(judge) as served:
        with pytest.raises(StageError, match=r"1 of 20 calls.*InternalServerError"):
            ask(served.config(), replies_file, prompts)
        assert len(served.requests) == 22, "two are tried again, and the others are asked all the same"
        up = True
        assert ask(served.config(), replies_file, prompts) == [f"of {prompt}" for prompt in prompts]
        assert len(served.requests) == 23


def test_an_endpoint_that_never_answers_or_is_down_is_a_clear_error(replies_file: Path) -> None:
    message = failing(lambda *_: None, replies_file, timeout=0.1, retries=0)
    assert "2 of 2 calls" in message
    assert "timed out" in message.lower()
    down = "http://127.0.0.1:9/v1"
    assert "2 of 2 calls" in failing(lambda *_: Response(), replies_file, base_url=down, retries=0)


@pytest.mark.parametrize(
    "response",
    [
        Response(body="<html>It works!</html>", kind="text/html"),
        Response(body='{"choices": []}'),
        Response(body='"[[A]]"'),
        Response(body="[" * 100_000 + "]" * 100_000),
        Response(status=404, body='{"error": {"message": "no such model"}}'),
    ],
)
def test_what_is_no_chat_completion_is_a_failure_and_never_a_verdict(replies_file: Path, response: Response) -> None:
    message = failing(lambda *_: response, replies_file, prompts=3 * GIVE_UP)
    assert f"{GIVE_UP} of {GIVE_UP} calls" in message, "after some failures in a row nothing more is asked"


def test_what_was_answered_is_kept_by_who_was_asked(replies_file: Path) -> None:
    prompts = list("abcd")

    def judge(prompt: str, _: int) -> Response:
        return Response(status=400, body="{}") if prompt == "b" else Response(text=f"of {prompt}")

    with serving(judge) as served:
        with pytest.raises(StageError, match="1 of 4 calls"):
            ask(served.config(), replies_file, prompts)
        with replies_file.open("a") as stream:
            stream.write('\n{"key": "cut o')
    with serving(lambda prompt, _: Response(text=f"now of {prompt}")) as again:
        config = served.config(base_url=served.url)
        assert ask(config, replies_file, list("acd")) == ["of a", "of c", "of d"], "nobody is asked"
        replies = ask(again.config(), replies_file, prompts)
        ask(again.config(model="another"), replies_file, ["a"])
        ask(again.config(), replies_file, ["a"])
    assert replies == [f"now of {prompt}" for prompt in prompts], "another endpoint is asked"
    assert len(again.requests) == 5, "and so is another model, once"


def test_a_redirect_takes_neither_key_nor_prompts_elsewhere(
    replies_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-canary-123")
    with serving(lambda *_: Response(text="[[A]]")) as other:
        response = Response(status=307, body="{}", headers={"Location": f"{other.url}/chat/completions?k=1"})
        message = failing(lambda *_: response, replies_file, prompts=1, api_key_env="JUDGE_KEY")
    assert not other.requests
    assert f"it redirects to {other.url.removesuffix('/v1')}," in message
