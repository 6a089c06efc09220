"""Requests to ``transformers serve``: what is refused, what reaches the chat template, and where answers end."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from rich.console import Console

from alignment.commands.serve.driver import LIBRARIES
from alignment.commands.serve.loaded_arms import LoadedArm, load_arms
from alignment.commands.shared.policy_finder import PolicyFinder
from alignment.data.tokens.tokenize import end_ids
from tests.asked_app import Answered, asking
from tests.served import END, TOOL, ServedRun, served_run, tokenizer_with_tools
from tests.tiny import tiny_model

ABSENT = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"transformers serves with {', '.join(ABSENT)}")
HI = [{"role": "user", "content": "Hi."}]
CALLED = [
    {"role": "user", "content": "When is it open?"},
    {
        "role": "assistant",
        "content": "Let me look.",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "opening_hours", "arguments": '{"shop": "bakery"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "name": "opening_hours", "content": "8 to 12"},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ServedRun:
    return served_run(tmp_path_factory.mktemp("requests"))


@pytest.fixture(scope="module")
def ask(run: ServedRun) -> Callable[..., Answered]:
    return asking(load_arms(PolicyFinder(Console(), "mine", run.output).policies(["dpo"])))


def chat(**changes: Any) -> dict[str, Any]:
    """A request for one token."""
    return {"model": "dpo", "messages": HI, "max_tokens": 1, "temperature": 0, **changes}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("logprobs", True),
        ("top_logprobs", 5),
        ("response_format", {"type": "json_object"}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", 0.5),
        ("functions", [{"name": "f"}]),
        ("reasoning_effort", "low"),
        ("max_tokens", 0),
        ("temperature", "hot"),
        ("top_p", 1.5),
        ("seed", "now"),
        ("stop", [1]),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(ask: Callable[..., Answered], field: str, value: Any) -> None:
    status, reply = ask("POST", "/v1/chat/completions", chat(**{field: value}))
    assert status == 400
    assert reply["error"]["message"].startswith(f"{field}={json.dumps(value)} is not" if field != "stop" else "stop=")
    assert reply["error"]["type"] == "invalid_request_error"


def test_other_endpoints_refuse_theirs(ask: Callable[..., Answered]) -> None:
    for path, body in [
        ("/v1/completions", {"prompt": "Hi.", "best_of": 2}),
        ("/v1/completions", {"prompt": "Hi.", "echo": True}),
        ("/v1/completions", {"prompt": "Hi.", "logit_bias": {"5": 1}}),
        ("/v1/responses", {"input": "Hi.", "previous_response_id": "one"}),
        ("/v1/responses", {"input": "Hi.", "conversation": "one"}),
        ("/v1/responses", {"input": "Hi.", "text": {"format": {"type": "json_object"}}}),
    ]:
        status, reply = ask("POST", path, {"model": "dpo", **body})
        assert (status, "is not supported here" in reply["error"]["message"]) == (400, True), (path, reply)


def test_values_that_ask_for_nothing_are_taken(ask: Callable[..., Answered]) -> None:
    harmless = {"n": 1, "logprobs": False, "response_format": {"type": "text"}, "user": "me", "tool_choice": "none"}
    status, reply = ask("POST", "/v1/chat/completions", chat(presence_penalty=0, **harmless))
    assert (status, reply["usage"]["completion_tokens"]) == (200, 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": None}, "model: name the policy"),
        ({"messages": []}, "messages: there are none"),
        ({"messages": [{"content": "Hi."}]}, "messages[0]: a message has a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content: only text"),
    ],
)
def test_a_request_that_is_no_conversation_is_refused(
    ask: Callable[..., Answered], changes: dict[str, Any], reason: str
) -> None:
    status, reply = ask("POST", "/v1/chat/completions", chat(**changes))
    assert (status, reply["error"]["message"].startswith(reason)) == (400, True), reply


def test_text_beside_a_call_and_the_name_of_a_result_reach_the_template(
    ask: Callable[..., Answered], run: ServedRun
) -> None:
    from alignment.commands.serve.request_checks import turns_of

    rendered = json.loads(json.dumps(CALLED))
    rendered[1]["tool_calls"][0]["function"]["arguments"] = {"shop": "bakery"}
    assert turns_of(CALLED) == rendered
    status, reply = ask("POST", "/v1/chat/completions", chat(messages=CALLED, tools=[TOOL]))
    assert status == 200
    ours = run.answer("dpo", rendered, limit=1, tools=[TOOL])
    without = run.answer("dpo", [rendered[0], rendered[1] | {"content": ""}, rendered[2]], limit=1, tools=[TOOL])
    assert reply["usage"]["prompt_tokens"] == len(ours.prompt) > len(without.prompt)


def pieces(stream: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in stream.split("\n\n") if line]


def test_a_stop_is_not_part_of_the_answer(ask: Callable[..., Answered], run: ServedRun) -> None:
    """Neither at once nor in pieces: whoever compares the answer would find the stop in it."""
    requests = [
        chat(max_tokens=12, messages=[{"role": "user", "content": question}])
        for question in ("Hi.", "When is the shop open?", "Where are the keys?", "Why?")
    ]
    answers = [ask("POST", "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"] for body in requests]
    whole, body = max(zip(answers, requests, strict=True), key=lambda pair: len(pair[0]))
    stop = whole[4:7]
    assert len(stop) == 3
    expected = whole.partition(stop)[0]
    (choice,) = ask("POST", "/v1/chat/completions", body | {"stop": [stop]})[1]["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
    streamed = pieces(ask("POST", "/v1/chat/completions", body | {"stop": stop, "stream": True})[1])
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in streamed) == expected
    status, reply = ask(
        "POST", "/v1/completions", {"model": "dpo", "prompt": "Hi.", "max_tokens": 12, "temperature": 0}
    )
    text = reply["choices"][0]["text"]
    stopped = {"model": "dpo", "prompt": "Hi.", "max_tokens": 12, "temperature": 0, "stop": text[3:5]}
    assert status == 200
    assert ask("POST", "/v1/completions", stopped)[1]["choices"][0]["text"] == text.partition(text[3:5])[0]


def test_a_conversation_that_the_template_refuses_is_a_refusal_with_its_words(run: ServedRun) -> None:
    (arm,) = load_arms(PolicyFinder(Console(), "mine", run.output).policies(["dpo"]))
    arm.tokenizer.chat_template = "{{ raise_exception('there is no system role') }}"
    status, reply = asking([arm])("POST", "/v1/chat/completions", chat())
    assert (status, reply["error"]["type"]) == (400, "invalid_request_error")
    assert "there is no system role" in reply["error"]["message"]


def test_whatever_fails_has_openai_s_form(run: ServedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    (arm,) = load_arms(PolicyFinder(Console(), "mine", run.output).policies(["dpo"]))

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError('no "memory"\nleft')

    monkeypatch.setattr(arm.model, "generate", failing)
    ask = asking([arm])
    status, reply = ask("POST", "/v1/chat/completions", chat())
    assert (status, reply["error"]["type"]) == (500, "server_error")
    assert reply["error"]["message"] == 'RuntimeError: no "memory"\nleft'
    *_, last = pieces(ask("POST", "/v1/chat/completions", chat(stream=True))[1])
    assert last == {"error": 'no "memory"\nleft'}


def test_an_answer_may_fill_the_context_and_a_prompt_may_not(run: ServedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    (arm,) = load_arms(PolicyFinder(Console(), "mine", run.output).policies(["dpo"]))
    prompt = len(run.answer("dpo", HI, limit=1).prompt)
    limits: list[int] = []

    def ended(*, input_ids: torch.Tensor, generation_config: Any, **_: Any) -> torch.Tensor:
        limits.append(generation_config.max_new_tokens)
        return torch.cat([input_ids, torch.tensor([[END]])], dim=1)

    with monkeypatch.context() as patched:
        patched.setattr(arm.model, "generate", ended)
        reply = asking([arm])("POST", "/v1/chat/completions", {"model": "dpo", "messages": HI})[1]
    assert (limits, reply["choices"][0]["finish_reason"]) == ([4096 - prompt], "stop")
    arm.model.config.max_position_embeddings = prompt + 5
    arm.model.generation_config.eos_token_id = [len(arm.tokenizer) - 1]
    ask = asking([arm])
    for limit in ({"max_tokens": 100}, {}):
        body = {"model": "dpo", "messages": HI, "temperature": 0, **limit}
        reply = ask("POST", "/v1/chat/completions", body)[1]
        assert reply["usage"]["completion_tokens"] == 5
        assert reply["choices"][0]["finish_reason"] == "length"
    arm.model.config.max_position_embeddings = prompt
    status, reply = ask("POST", "/v1/chat/completions", chat())
    assert status == 400
    assert f"the prompt has {prompt} tokens and the context of this policy {prompt}" in reply["error"]["message"]


# ---- models for which transformers knows the form of an answer -------------------------------------------------------


def answering(text: str, *, eos: str = "<|endoftext|>") -> Callable[..., Answered]:
    """An arm of Qwen's kind that always gives this answer."""
    tokenizer = tokenizer_with_tools()
    tokenizer.add_special_tokens({"eos_token": eos})
    model = tiny_model("qwen2", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = sorted(end_ids(tokenizer))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    def generated(*, input_ids: torch.Tensor, streamer: Any = None, **_: Any) -> torch.Tensor:
        if streamer is not None:
            streamer.put(input_ids)
            for token in ids:
                streamer.put(torch.tensor([token]))
            streamer.end()
        return torch.cat([input_ids, torch.tensor([ids])], dim=1)

    model.generate = generated
    return asking([LoadedArm(name="dpo", model=model, tokenizer=tokenizer)])


def content(ask: Callable[..., Answered]) -> tuple[str | None, str]:
    """The answer at once, and in pieces."""
    (choice,) = ask("POST", "/v1/chat/completions", chat(max_tokens=100))[1]["choices"]
    streamed = pieces(ask("POST", "/v1/chat/completions", chat(max_tokens=100, stream=True))[1])
    parts = [piece["choices"][0]["delta"].get("content", "") for piece in streamed if "choices" in piece]
    return choice["message"].get("content"), "".join(parts)


def test_the_end_of_a_turn_is_no_text_whatever_token_it_is() -> None:
    for text in ("It is four.", "It is four.<|im_end|>", "It is four.<|stop|>"):
        assert content(answering(text, eos="<|stop|>")) == ("It is four.", "It is four.")


def test_a_stop_ends_an_answer_that_is_divided() -> None:
    ask = answering("18\n\nQuestion: and more<|im_end|>")
    (choice,) = ask("POST", "/v1/chat/completions", chat(max_tokens=100, stop="Question:"))[1]["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("18\n\n", "stop")


def test_a_call_that_was_cut_off_is_text() -> None:
    cut = '<tool_call>\n{"name": "opening_hours", "argu'
    status, reply = answering(cut)("POST", "/v1/chat/completions", chat(max_tokens=100))
    assert (status, '"argu' in reply["choices"][0]["message"]["content"]) == (200, True)


def test_a_call_and_the_texts_around_it_are_all_returned() -> None:
    call = '<tool_call>\n{"name": "opening_hours", "arguments": {"shop": "bakery"}}\n</tool_call>'
    ask = answering(f"One moment.\n{call}\nThat is all.<|im_end|>")
    (choice,) = ask("POST", "/v1/chat/completions", chat(max_tokens=100, tools=[TOOL]))[1]["choices"]
    assert choice["message"]["content"] == "One moment.\nThat is all."
    (made,) = choice["message"]["tool_calls"]
    assert made["function"] == {"name": "opening_hours", "arguments": '{"shop": "bakery"}'}
    assert choice["finish_reason"] == "tool_calls"


# ---- pieces of a stream ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("a b c", [], "a b c"),
        ("18\n\nQuestion: 2", ["Question:"], "18\n\n"),
        ("aab", ["ab"], "a"),
        ("one END two STOP", ["STOP", "END"], "one "),
        ("ends with EN", ["END"], "ends with EN"),
        ("<||><|end|>rest", ["<|end|>"], "<||>"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_pieces_of_any_size_end_where_the_whole_text_ends(
    text: str, stops: Sequence[str], expected: str, size: int
) -> None:
    from alignment.commands.serve.stop_texts import StopCut, before_stops

    assert before_stops(text, stops) == expected
    cut = StopCut(stops)
    returned = [cut.after(text[start : start + size]) for start in range(0, len(text), size)]
    assert "".join([*returned, cut.rest()]) == expected


def test_an_error_in_a_stream_fits_into_json() -> None:
    from transformers.cli.serving.utils import _StreamError

    from alignment.commands.serve.stop_texts import CutQueue

    async def handed_on() -> Any:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        queue.put_nowait(_StreamError('a "b"\n\nc'))
        return await CutQueue(queue, []).get()

    assert json.loads(f'"{asyncio.run(handed_on()).msg}"') == 'a "b"\n\nc'
