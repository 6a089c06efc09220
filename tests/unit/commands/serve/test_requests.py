"""The app of the default engine: what it refuses, what reaches the chat template, and where answers end."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from rich.console import Console

from alignment.commands.serve.loaded_arms import LoadedArm, load_arms
from alignment.commands.serve.policy_generation import StopCut, before_stops
from alignment.commands.serve.request_checks import turns_of
from alignment.commands.shared.listening import PAGE_LIBRARIES
from alignment.commands.shared.policy_finder import PolicyFinder
from alignment.core import deadline
from alignment.data.tokens.tokenize import end_ids, prompt_ids
from alignment.data.turns import Message
from tests.served import END, TOOL, Answered, ServedRun, asking, served_run, tokenizer_with_tools
from tests.tiny import tiny_model

ABSENT = [name for name in PAGE_LIBRARIES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"the engine needs {', '.join(ABSENT)}")
Ask = Callable[..., Answered]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
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


def arms_of(run: ServedRun, *names: str) -> Sequence[LoadedArm]:
    return load_arms(PolicyFinder(Console(), "mine", run.output).policies(names))


@pytest.fixture(scope="module")
def ask(run: ServedRun) -> Ask:
    """Calls the app of two arms in this process; returns status and body."""
    return asking(arms_of(run, "sft", "dpo"))


@pytest.fixture
def arm(run: ServedRun) -> LoadedArm:
    (arm,) = arms_of(run, "dpo")
    return arm


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": "dpo", "messages": HI, "max_tokens": 1, "temperature": 0, **changes}


def called(**function: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "tool_calls": [{"function": function} if function else {}]}]


WRONG: list[Any] = [
    ("model", None, "model"),
    ("n", 2, "n"),
    ("generation_config", '{"num_beams": 500}', "generation_config"),
    ("chat_template_kwargs", {"chat_template": "{{ 7 * 7 }}"}, "chat_template_kwargs.chat_template"),
    ("max_tokens", 0, "max_tokens"),
    ("max_tokens", True, "max_tokens"),
    ("temperature", -1, "temperature"),
    ("temperature", 1e-300, "temperature"),
    pytest.param("temperature", 10**400, "temperature", id="temperature-huge"),
    ("top_p", 1.5, "top_p"),
    ("seed", 10**30, "seed"),
    ("stop", [1], "stop"),
    ("stop", list("abcde"), "stop"),
    ("stream", "yes", "stream"),
    ("stream_options", [], "stream_options"),
    ("stream_options", {"include_usage": 1}, "include_usage"),
    ("logit_bias", {"-1": 1}, "logit_bias"),
    ("logit_bias", {"5": 1000}, "logit_bias"),
    ("tools", [5], "tools[0]"),
    ("messages", [], "messages"),
    ("messages", ["Hi."], "messages[0]"),
    ("messages", [*HI, {"role": "king", "content": "Hi."}], "messages[1].role"),
    ("messages", [{"role": "user"}], "messages[0].content"),
    ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
    ("messages", [{"role": "user", "content": "Hi.", "audio": {"id": "1"}}], "messages[0].audio"),
    ("messages", [{"role": "user", "content": "half \ud800"}], "messages"),
    ("messages", [{"role": "assistant", "tool_calls": 5}], "messages[0].tool_calls"),
    ("messages", called(), "messages[0].tool_calls"),
    ("messages", called(name="f", arguments="{"), "messages[0].tool_calls"),
    ("messages", called(name="f", arguments=[5]), "messages[0].tool_calls[0]"),
]


@pytest.mark.parametrize(("field", "value", "param"), WRONG)
def test_what_a_request_cannot_have_is_refused_by_name(ask: Ask, field: str, value: Any, param: str) -> None:
    """At once, though a stream was asked for."""
    status, reply = ask("POST", CHAT, chat(**{"stream": True, field: value}))
    assert (status, reply["error"]["type"], reply["error"]["param"]) == (400, "invalid_request_error", param)


OF_TEXTS = [("best_of", 2), ("suffix", "."), ("logprobs", 0), ("messages", HI), ("prompt", ""), ("prompt", ["Hi."])]


@pytest.mark.parametrize(("field", "value"), [*OF_TEXTS, ("prompt", "half \udfff")])
def test_completions_refuse_what_is_theirs(ask: Ask, field: str, value: Any) -> None:
    status, reply = ask("POST", TEXT, {"model": "dpo", "prompt": "Hi.", field: value})
    assert (status, reply["error"]["param"]) == (400, field)


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", CHAT, b"[]", {}, 400),
        ("POST", CHAT, b"\xff", {}, 400),
        ("POST", CHAT, b"[" * 100_000, {}, 400),
        ("POST", CHAT, b'{"model": "dpo", "temperature": NaN}', {}, 400),
        ("POST", CHAT, b'{"model": "dpo", "seed": ' + b"9" * 10_000 + b"}", {}, 400),
        ("POST", CHAT, chat(user="x" * 5_000_000), {}, 413),  # before it is read
        ("POST", CHAT, chat(), {"content_type": "text/plain"}, 415),  # a form of another site's page
        ("GET", CHAT, None, {}, 405),
    ],
)
def test_what_is_no_request_is_refused_in_openai_s_form(
    ask: Ask, method: str, path: str, body: Any, headers: dict[str, str], status: int
) -> None:
    got, reply = ask(method, path, body, **headers)
    assert (got, reply["error"]["type"]) == (status, "invalid_request_error")


def test_the_app_lists_the_arms_and_answers_for_them(ask: Ask) -> None:
    status, listed = ask("GET", "/v1/models", host="localhost:8000")
    assert (status, [model["id"] for model in listed["data"]]) == (200, ["sft", "dpo"])
    for arm in ("sft", "dpo"):
        status, reply = ask("POST", CHAT, chat(model=arm))
        assert (status, reply["model"], reply["usage"]["completion_tokens"]) == (200, arm, 1)
    for path, body in ((CHAT, chat(model="/base")), (TEXT, {"model": "sft:weights.gguf", "prompt": "Hi."})):
        status, reply = ask("POST", path, body)
        message = f"there is no model {body['model']!r} here, only: sft, dpo"
        assert (status, reply["error"]["message"]) == (404, message), "no endpoint loads another model"
    # a page that points its own name at this machine
    assert ask("POST", CHAT, chat(), host="evil.example:8000") == (400, "Invalid host header")


def test_values_that_ask_for_nothing_are_taken(ask: Ask) -> None:
    harmless = {"n": 1, "logprobs": False, "response_format": {"type": "text"}, "user": "me", "tool_choice": "none"}
    harmless |= {"parallel_tool_calls": False, "tools": [], "stop": None, "stream": None, "chat_template_kwargs": {}}
    status, reply = ask("POST", CHAT, chat(presence_penalty=0, **harmless))
    assert (status, reply["usage"]["completion_tokens"]) == (200, 1)


def test_a_bias_of_a_token_makes_it_the_answer(ask: Ask) -> None:
    token = 40
    for path, asked in ((CHAT, {"messages": HI}), (TEXT, {"prompt": "Hi."})):
        body = {"model": "dpo", "max_tokens": 3, "temperature": 0, "logit_bias": {str(token): 100}, **asked}
        (choice,) = ask("POST", path, body)[1]["choices"]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert text == tokenizer_with_tools().decode([token] * 3)


def test_a_seed_repeats_an_answer(ask: Ask) -> None:
    bodies = [chat(max_tokens=12, temperature=1, seed=seed) for seed in (5, 5, 6)]
    first, again, other = [ask("POST", CHAT, body)[1]["choices"][0]["message"] for body in bodies]
    assert first == again != other


def test_control_tokens_in_a_message_are_text_as_in_training(ask: Ask) -> None:
    words = "stop <|im_end|> here"
    status, reply = ask("POST", CHAT, chat(messages=[{"role": "user", "content": words}]))
    tokenizer = tokenizer_with_tools()
    assert status == 200
    assert reply["usage"]["prompt_tokens"] == len(prompt_ids(tokenizer, [Message(role="user", content=words)]))


def with_template(arm: LoadedArm, template: str) -> Ask:
    arm.tokenizer.chat_template = template
    return asking([arm])


PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}no thoughts please{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_an_option_that_the_template_reads_reaches_it(arm: LoadedArm) -> None:
    ask = with_template(arm, PLAIN)
    counts = [
        ask("POST", CHAT, chat(chat_template_kwargs=options))[1]["usage"]["prompt_tokens"]
        for options in ({}, {"enable_thinking": True}, {"enable_thinking": False})
    ]
    assert counts[0] == counts[1] < counts[2]
    for value in ([1], None, {"a": 1}):
        status, reply = ask("POST", CHAT, chat(chat_template_kwargs={"enable_thinking": value}))
        assert (status, reply["error"]["param"]) == (400, "chat_template_kwargs.enable_thinking")


def test_more_messages_than_the_context_has_tokens_are_not_rendered(arm: LoadedArm) -> None:
    ask = with_template(arm, PLAIN.replace("in messages", "in messages[:1]"))
    for number, status in ((4096, 200), (4097, 400)):
        answered, reply = ask("POST", CHAT, chat(messages=HI * number))
        assert answered == status
    assert reply["error"]["param"] == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages if m.tool_calls %}<tool_call>{{ m.tool_calls }}</tool_call>{% endfor %}",
        "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}",
    ],
    ids=["not in the template", "calls would not be recognised"],
)
def test_tools_that_a_policy_cannot_have_are_refused(arm: LoadedArm, template: str) -> None:
    ask = with_template(arm, template + PLAIN)
    status, reply = ask("POST", CHAT, chat(tools=[TOOL]))
    assert (status, reply["error"]["param"]) == (400, "tools")
    assert ask("POST", CHAT, chat(tools=[]))[0] == 200


def test_a_template_that_refuses_or_never_ends_is_a_refusal(arm: LoadedArm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "SECONDS", 0.2)
    endless = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    refuses = "{{ raise_exception('there is no third message') }}"
    of_length = "{{% if messages | length == {} %}}{}{{% endif %}}"
    ask = with_template(arm, PLAIN + of_length.format(2, endless) + of_length.format(3, refuses))
    for number, words in ((2, ""), (3, "there is no third message")):
        status, reply = ask("POST", CHAT, chat(messages=HI * number))
        assert (status, reply["error"]["param"]) == (400, "messages")
        assert words in reply["error"]["message"]
    assert ask("POST", CHAT, chat())[0] == 200


def test_text_beside_a_call_and_the_name_of_a_result_reach_the_template(ask: Ask, run: ServedRun) -> None:
    rendered = json.loads(json.dumps(CALLED))
    rendered[1]["tool_calls"][0]["function"]["arguments"] = {"shop": "bakery"}
    assert [turn.as_dict() for turn in turns_of({"messages": CALLED})] == rendered
    status, reply = ask("POST", CHAT, chat(messages=CALLED, tools=[TOOL]))
    assert status == 200
    ours = run.answer("dpo", rendered, limit=1, tools=[TOOL])
    without = run.answer("dpo", [rendered[0], rendered[1] | {"content": ""}, rendered[2]], limit=1, tools=[TOOL])
    assert reply["usage"]["prompt_tokens"] == len(ours.prompt) > len(without.prompt)


def pieces(stream: str) -> list[dict[str, Any]]:
    *events, end, empty = stream.split("\n\n")
    assert (end, empty) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_stop_is_not_part_of_the_answer(ask: Ask, run: ServedRun) -> None:
    """Neither at once nor in pieces: whoever compares the answer would find the stop in it."""
    requests = [
        chat(max_tokens=12, messages=[{"role": "user", "content": question}])
        for question in ("Hi.", "When is the shop open?", "Where are the keys?", "Why?")
    ]
    answers = [ask("POST", CHAT, body)[1]["choices"][0]["message"]["content"] for body in requests]
    whole, body = max(zip(answers, requests, strict=True), key=lambda pair: len(pair[0]))
    stop = whole[4:7]
    assert len(stop) == 3
    expected = whole.partition(stop)[0]
    (choice,) = ask("POST", CHAT, body | {"stop": ["\0", stop]})[1]["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
    streamed = pieces(ask("POST", CHAT, body | {"stop": ["\0", stop], "stream": True})[1])
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in streamed) == expected
    completion = {"model": "dpo", "prompt": "Hi.", "max_tokens": 12, "temperature": 0}
    text = ask("POST", TEXT, completion)[1]["choices"][0]["text"]
    stopped = ask("POST", TEXT, completion | {"stop": text[3:5]})[1]["choices"][0]["text"]
    assert stopped == text.partition(text[3:5])[0]


def test_whatever_fails_has_openai_s_form(arm: LoadedArm, monkeypatch: pytest.MonkeyPatch) -> None:

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError('no "memory"\nleft')

    monkeypatch.setattr(arm.model, "generate", failing)
    ask = asking([arm])
    status, reply = ask("POST", CHAT, chat())
    assert (status, reply["error"]["type"]) == (500, "server_error")
    assert reply["error"]["message"] == 'RuntimeError: no "memory"\nleft'
    *_, last = pieces(ask("POST", CHAT, chat(stream=True))[1])
    assert last == {"error": reply["error"]}


def test_an_answer_may_fill_the_context_and_a_prompt_may_not(
    run: ServedRun, arm: LoadedArm, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = len(run.answer("dpo", HI, limit=1).prompt)
    limits: list[int] = []

    def ended(*, input_ids: torch.Tensor, generation_config: Any, streamer: Any, **_: Any) -> None:
        limits.append(generation_config.max_new_tokens)
        streamer.put(input_ids)
        streamer.put(torch.tensor([END]))

    with monkeypatch.context() as patched:
        patched.setattr(arm.model, "generate", ended)
        reply = asking([arm])("POST", CHAT, {"model": "dpo", "messages": HI})[1]
    assert (limits, reply["choices"][0]["finish_reason"]) == ([4096 - prompt], "stop")
    arm.model.config.max_position_embeddings = prompt + 5
    arm.model.generation_config.eos_token_id = [len(arm.tokenizer) - 1]
    ask = asking([arm])
    for limit in ({"max_tokens": 100}, {}):
        reply = ask("POST", CHAT, {"model": "dpo", "messages": HI, "temperature": 0, **limit})[1]
        assert reply["usage"]["completion_tokens"] == 5
        assert reply["choices"][0]["finish_reason"] == "length"
    arm.model.config.max_position_embeddings = prompt
    status, reply = ask("POST", CHAT, chat())
    assert (status, reply["error"]["param"]) == (400, "messages")


def answering(text: str, *, eos: str = "<|endoftext|>") -> Ask:
    """An arm of Qwen's kind that always gives this answer."""
    tokenizer = tokenizer_with_tools()
    tokenizer.add_special_tokens({"eos_token": eos})
    model = tiny_model("qwen2", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = sorted(end_ids(tokenizer))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    def generated(*, input_ids: torch.Tensor, streamer: Any, **_: Any) -> None:
        streamer.put(input_ids)
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()

    model.generate = generated
    return asking([LoadedArm(name="dpo", model=model, tokenizer=tokenizer)])


def content(ask: Ask) -> tuple[str | None, str]:
    (choice,) = ask("POST", CHAT, chat(max_tokens=100))[1]["choices"]
    streamed = pieces(ask("POST", CHAT, chat(max_tokens=100, stream=True))[1])
    parts = [piece["choices"][0]["delta"].get("content", "") for piece in streamed if "choices" in piece]
    return choice["message"].get("content"), "".join(parts)


def test_the_end_of_a_turn_is_no_text_whatever_token_it_is() -> None:
    for text in ("It is four.", "It is four.<|im_end|>", "It is four.<|stop|>"):
        assert content(answering(text, eos="<|stop|>")) == ("It is four.", "It is four.")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ('<tool_call>\n{"name": "opening_hours", "argu', '"argu'),
        (f'<tool_call>\n{{"name": "f", "arguments": {"[" * 5000}{"]" * 5000}}}\n</tool_call>', "[[["),
    ],
    ids=["cut off", "nested too deeply"],
)
def test_a_call_that_cannot_be_read_is_text(call: str, words: str) -> None:
    status, reply = answering(call)("POST", CHAT, chat(max_tokens=100, tools=[TOOL]))
    assert (status, words in reply["choices"][0]["message"]["content"]) == (200, True)


def test_a_call_and_the_texts_around_it_are_all_returned() -> None:
    call = '<tool_call>\n{"name": "opening_hours", "arguments": {"shop": "bakery"}}\n</tool_call>'
    ask = answering(f"One moment.\n{call}\nThat is all.<|im_end|>")
    (choice,) = ask("POST", CHAT, chat(max_tokens=100, tools=[TOOL]))[1]["choices"]
    assert choice["message"]["content"] == "One moment.\nThat is all."
    (made,) = choice["message"]["tool_calls"]
    assert made["function"] == {"name": "opening_hours", "arguments": '{"shop": "bakery"}'}
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("a b c", [], "a b c"),
        ("18\n\nQuestion: 2", ["Question:"], "18\n\n"),
        ("aab", ["ab"], "a"),
        ("one END two STOP", ["STOP", "END"], "one "),
        ("one STOPPED two", ["END", "STOPPED", "!"], "one "),
        ("ends with EN", ["END"], "ends with EN"),
        ("<||><|end|>rest", ["<|end|>"], "<||>"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_pieces_of_any_size_end_where_the_whole_text_ends(
    text: str, stops: Sequence[str], expected: str, size: int
) -> None:
    assert before_stops(text, stops) == expected
    cut = StopCut(stops)
    returned = [cut.after(text[start : start + size]) for start in range(0, len(text), size)]
    assert "".join([*returned, cut.rest()]) == expected


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waits", [False, True], ids=["answered", "waiting"])
def test_the_work_of_a_request_ends_when_its_client_goes_away(
    arm: LoadedArm, monkeypatch: pytest.MonkeyPatch, stream: bool, waits: bool
) -> None:
    steps: list[int] = []

    def endless(*, input_ids: torch.Tensor, streamer: Any, **_: Any) -> None:
        streamer.put(input_ids)
        for step in range(10_000):
            steps.append(step)
            streamer.put(torch.tensor([40]))
            time.sleep(0.002)

    with monkeypatch.context() as patched:
        patched.setattr(arm.model, "generate", endless)
        ask = asking([arm])
        bodies = [chat(stream=stream, max_tokens=4000)] * (2 if waits else 1)
        ask.leave(CHAT, bodies, after=0.2)
    reached = len(steps)
    assert 0 < reached < 5_000
    status, reply = ask("POST", CHAT, chat())
    assert (status, reply["usage"]["completion_tokens"]) == (200, 1)
    assert len(steps) <= reached + 1, "nothing went on"


def test_the_reading_of_a_prompt_ends_when_its_client_goes_away(
    arm: LoadedArm, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = arm.model.base_model.layers[:2]
    of_first, of_second, passes = first.forward, second.forward, []

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        return of_first(*args, **kwargs)

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        return of_second(*args, **kwargs)

    ask = asking([arm])
    monkeypatch.setattr(first, "forward", slow)
    monkeypatch.setattr(second, "forward", counted)
    ask.leave(CHAT, [chat()], after=0.1)
    assert ask("POST", CHAT, chat())[0] == 200
    assert len(passes) == 1
