"""What is asked of an engine, and every reply that is refused."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.config.launch import Engine, SamplingConfig
from alignment.engines import completions
from alignment.engines.completions import Asked, CallFailed, EngineAnswer, EngineClient, Generation, WrongReply, checked
from tests.engine_server import COMPLETIONS, Failure, FakeEngine, engine_server

LACKS = "lacks what a vLLM server returns"

ASKED = Asked(prompt=[5, 9], answers=2, seed=11)
GENERATION = Generation(max_new_tokens=3, temperature=1.0, end_ids=[2])
WHERE = "stages.ppo.sampling"
Change = Callable[[dict[str, Any]], object]


def reply() -> dict[str, Any]:
    first = {
        "index": 0,
        "token_ids": [4, 7, 8],
        "logprobs": {"token_logprobs": [-1.0, -0.5, -0.25]},
        "prompt_token_ids": [5, 9],
    }
    second = {"index": 1, "token_ids": [6, 2], "logprobs": {"token_logprobs": [-2.0, 0.0]}, "prompt_token_ids": [5, 9]}
    return {"model": "policy-3", "choices": [second, first]}


def first(reply: dict[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = reply["choices"][1]
    return choice


def logprobs_of(values: list[Any]) -> Change:
    return lambda reply: first(reply).update(logprobs={"token_logprobs": values})


def ids_of(ids: Any) -> Change:
    def change(reply: dict[str, Any]) -> None:
        first(reply)["token_ids"] = ids
        first(reply)["logprobs"] = {"token_logprobs": [-1.0] * len(ids)}

    return change


FAULTS: dict[str, tuple[Change, str]] = {
    "another version": (lambda reply: reply.update(model="policy-2"), "'policy-2', not 'policy-3'"),
    "too few answers": (lambda reply: reply["choices"].pop(), "1 answers, not 2"),
    "another prompt": (lambda reply: first(reply).update(prompt_token_ids=[5, 8]), "another prompt"),
    "too many tokens": (ids_of([4, 7, 8, 9]), "4 tokens and 4 log-probabilities"),
    "a log-probability too few": (logprobs_of([-1.0, -0.5]), "3 tokens and 2 log-probabilities"),
    "no number": (logprobs_of([-1.0, math.nan, -0.5]), "log-probability"),
    "infinite": (logprobs_of([-1.0, -math.inf, -0.5]), "log-probability"),
    "above 1": (logprobs_of([-1.0, 0.5, -0.5]), "log-probability"),
    "a text for a number": (logprobs_of([-1.0, "-1", -0.5]), "log-probability"),
    "ends without an end": (ids_of([4, 7]), "end token"),
    "no choices": (lambda reply: reply.pop("choices"), f"{LACKS} (KeyError: 'choices')"),
    "no token ids": (lambda reply: first(reply).pop("token_ids"), LACKS),
    "no log-probabilities": (lambda reply: first(reply).update(logprobs=None), LACKS),
    "a negative token": (ids_of([4, -7, 8]), "token"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_reply_is_refused(fault: str) -> None:
    change, words = FAULTS[fault]
    wrong = reply()
    change(wrong)
    with pytest.raises(WrongReply) as raised:
        checked(wrong, "policy-3", ASKED, GENERATION)
    assert words in str(raised.value)


@contextmanager
def asking(base: Path, *, key: str = "", **changes: Any) -> Iterator[tuple[FakeEngine, EngineClient]]:
    with engine_server(base, key=key) as engine:
        config = replace(SamplingConfig(engine=Engine.vllm, timeout=5.0, retries=0), **changes)
        with closing(EngineClient(config, engine.url, key, where=WHERE)) as client:
            yield engine, client


def answers_of(client: EngineClient, *asked: Asked, generation: Generation = GENERATION) -> list[list[EngineAnswer]]:
    return client.answers("base", asked, generation)


def test_a_call_asks_for_tokens_as_they_were_sampled(base: Path) -> None:
    with asking(base, key="secret") as (engine, client):
        answers_of(client, ASKED, generation=replace(GENERATION, temperature=0.7))
        (body,) = engine.paths(COMPLETIONS)
    assert body == {
        "model": "base",
        "prompt": [5, 9],
        "n": 2,
        "seed": 11,
        "max_tokens": 3,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": [2],
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
    }


def test_long_groups_are_cut_in_calls_whose_seeds_go_on(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [Asked(prompt=[5, 9], answers=7, seed=100), Asked(prompt=[8], answers=1, seed=50)]
    with asking(base) as (engine, client):
        whole = answers_of(client, *asked)
        assert sorted(body["n"] for body in engine.paths(COMPLETIONS)) == [1, 7]
        for limit, expected in (
            (15, [([5, 9], 100, 3), ([5, 9], 103, 3), ([5, 9], 106, 1), ([8], 50, 1)]),  # each behind a prompt of two
            (2, [*(([5, 9], seed, 1) for seed in range(100, 107)), ([8], 50, 1)]),  # longer than a reply may be
        ):
            engine.calls.clear()
            monkeypatch.setattr(completions, "TOKENS_A_REPLY", limit)
            assert answers_of(client, *asked) == whole
            calls = [(body["prompt"], body["seed"], body["n"]) for body in engine.paths(COMPLETIONS)]
            assert sorted(calls) == expected


def test_answers_stand_in_the_order_of_their_prompts_whenever_replies_come(base: Path) -> None:
    asked = [Asked(prompt=[token], answers=2, seed=token) for token in range(3, 15)]
    with asking(base, concurrency=1) as (_, client):
        expected = answers_of(client, *asked)
    together = threading.Barrier(3)

    def slow(path: str, number: int) -> None:
        together.wait(5)  # as many calls are under way at once as the setting says
        engine.over.wait(0.1 if number < 6 else 0)

    with asking(base, concurrency=3) as (engine, client):
        engine.failing = slow
        seen: list[int] = []
        assert client.answers("base", asked, GENERATION, seen.append) == expected
    assert seen == [2] * len(asked), "of each reply, its answers"


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (Failure(status=500, text="CUDA out of memory"), "CUDA out of memory"),
        (Failure(drops=True), "Connection error"),
        (Failure(hangs=True), "timed out"),
    ],
)
def test_a_call_that_fails_says_why(base: Path, failure: Failure, words: str) -> None:
    with asking(base, timeout=1.0) as (engine, client):
        engine.failing = lambda path, number: failure
        with pytest.raises(CallFailed, match=f"{COMPLETIONS}: .*{words}"):
            answers_of(client, ASKED)
        assert len(engine.calls) == 1, "without retries"


def test_a_key_is_sent_and_never_shown(base: Path) -> None:
    with asking(base, key="secret") as (engine, client):
        assert client.models() == ["base"]
        engine.failing = lambda path, number: Failure(status=500, text="secret")
        with pytest.raises(CallFailed) as raised:
            client.models()
        stranger = EngineClient(SamplingConfig(retries=0), engine.url, "wrong", where=WHERE)
        with closing(stranger), pytest.raises(CallFailed, match=r"/v1/models: .*401"):
            stranger.models()
    assert "secret" not in str(raised.value)
