"""What is refused of a request, because ``transformers serve`` would ignore it or fail in the middle of an answer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import HTTPException

_Asks = Callable[[Any], bool]
"""Whether a value asks for more than the field's absence does."""


def _other_than(usual: Any) -> _Asks:
    return lambda value: bool(value != usual)


def _unless_false(value: Any) -> bool:
    return value is not False


def _form(value: Any) -> bool:
    return not isinstance(value, Mapping) or value.get("type") != "text"


def _text_form(value: Any) -> bool:
    return not isinstance(value, Mapping) or _form(value.get("format") or {"type": "text"})


_PENALTIES: Mapping[str, _Asks] = {"presence_penalty": bool, "frequency_penalty": bool}
"""transformers ignores the first, and takes the second for a penalty on the words of the prompt too."""
CHAT: Mapping[str, _Asks] = {
    **_PENALTIES,
    "n": _other_than(1),
    "logprobs": bool,
    "top_logprobs": bool,
    "response_format": _form,
    "tool_choice": _other_than("auto"),
    "functions": bool,
    "function_call": bool,
    "reasoning_effort": bool,
    "prediction": bool,
    "audio": bool,
    "modalities": _other_than(["text"]),
    "verbosity": _other_than("medium"),
    "web_search_options": _unless_false,
}
COMPLETION: Mapping[str, _Asks] = {
    **_PENALTIES,
    "n": _other_than(1),
    "best_of": _other_than(1),
    "echo": bool,
    "logit_bias": bool,
    "logprobs": _unless_false,
    "suffix": bool,
}
RESPONSE: Mapping[str, _Asks] = {
    "background": bool,
    "context_management": bool,
    "conversation": bool,
    "include": bool,
    "max_tool_calls": bool,
    "previous_response_id": bool,
    "prompt": bool,
    "reasoning": bool,
    "text": _text_form,
    "tool_choice": _other_than("auto"),
    "top_logprobs": bool,
    "truncation": _other_than("disabled"),
}
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""Fields that bound the tokens of an answer."""
_NUMBERS: Mapping[str, tuple[float, str]] = {"temperature": (math.inf, "0 or more"), "top_p": (1.0, "0 to 1")}
"""The largest value, and in words which are allowed; the smallest is 0."""


def refusal(message: str) -> HTTPException:
    """Status 400 with the reason."""
    return HTTPException(status_code=400, detail=message)


def refuse_unsupported(body: Mapping[str, Any], asks: Mapping[str, _Asks]) -> None:
    """Checks the fields of a request; ``asks`` are those that this endpoint would ignore.

    Raises:
        HTTPException: status 400. A field asks for what is not supported, or has a value that it cannot have.
    """
    for name, asks_for_more in asks.items():
        value = body.get(name)
        if name == "tool_choice" and not body.get("tools"):
            continue  # without tools there is nothing to choose
        if value is not None and asks_for_more(value):
            raise refusal(f"{name}={_short(value)} is not supported here; leave it out, or serve with --engine vllm")
    if not isinstance(body.get("model"), str):
        raise refusal("model: name the policy")
    for name in LIMITS:
        value = body.get(name)
        if value is not None and not (type(value) is int and value >= 1):
            raise refusal(f"{name}={_short(value)} is not a whole number of 1 or more")
    for name, (largest, allowed) in _NUMBERS.items():
        value = body.get(name)
        if value is not None and not (type(value) in (int, float) and 0 <= value <= largest):
            raise refusal(f"{name}={_short(value)} is not allowed; a number of {allowed}")
    if body.get("seed") is not None and type(body["seed"]) is not int:
        raise refusal(f"seed={_short(body['seed'])} is not a whole number")


def stops_of(body: Mapping[str, Any]) -> list[str]:
    """The texts at which an answer ends.

    Raises:
        HTTPException: status 400. ``stop`` is neither a text nor a list of texts, or one of them is empty.
    """
    stop = body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise refusal(f"stop={_short(stop)} is neither a text nor a list of texts")
    return stops


def turns_of(messages: Any) -> list[dict[str, Any]]:
    """A conversation as chat templates read it: contents are texts, and arguments of calls are mappings.

    All else that a message has is kept, such as the text beside a call, earlier thoughts and the name of a tool.

    Raises:
        HTTPException: status 400. The messages are not a conversation of texts.
    """
    if not isinstance(messages, list) or not messages:
        raise refusal("messages: there are none")
    return [_turn(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _turn(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise refusal(f"{where}: a message has a role and a content")
    turn = {name: value for name, value in message.items() if value is not None}
    turn["content"] = _content(message.get("content"), where)
    if turn.get("tool_calls"):
        turn["tool_calls"] = [_call(call, where) for call in turn["tool_calls"]]
    return turn


def _content(content: Any, where: str) -> str:
    """The text; texts of several parts are joined with spaces, as transformers joins them."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts: list[Any] = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise refusal(f"{where}.content: only text is supported")
    return " ".join(texts)


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise refusal(f"{where}.tool_calls: a call has a function with a name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise refusal(f"{where}.tool_calls: the arguments of {function['name']} are not JSON: {error}") from error
    parsed = {**function, "arguments": arguments}
    return {**call, "function": parsed} if "function" in call else parsed


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"
