"""The fields of a request to the default engine. What it cannot do is refused by name, never ignored."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from alignment.config.faults import suggestion
from alignment.core.errors import AlignmentError
from alignment.data import turns
from alignment.data.fields import Fields
from alignment.data.templates import options_of as options_of_template
from alignment.data.templates import reads_tools, with_options
from alignment.data.tokens.rendering import Tools, render
from alignment.data.turns import THOUGHTS, Message

MOST_STOPS = 4
"""As many as OpenAI takes."""
COLDEST, HOTTEST = 0.01, 100.0
"""Temperatures above 0 between which float32 has no overflow."""
_BIAS = 100.0
_SEEDS = 2**63
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,8}")
KnownFields = tuple[Sequence[str], Mapping[str, Sequence[str]]]
"""The fields that are read or change nothing, and the values (as JSON) of others that ask for no more than absence
does."""


class RequestError(Exception):
    """Why a request gets no answer; ``param`` is the field that is wrong, as in OpenAI's errors."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerOptions:
    """How an answer is made and sent. ``max_tokens`` is None where only the context limits it; ``bias`` is added to
    the logits of token ids."""

    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    bias: Mapping[int, float]
    stops: tuple[str, ...]
    is_streamed: bool
    streams_usage: bool


_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields that change no answer."""
_OPTIONS = ("model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "logit_bias")
_OF_TOOLS = ("tool_choice", "parallel_tool_calls")
"""Fields that mean nothing without tools."""
_NOTHING = ("0", "0.0", "false", '""', "[]", "{}")
_COMMON = {"n": ("1",), "presence_penalty": _NOTHING, "frequency_penalty": _NOTHING}
CHAT: KnownFields = (
    (*_OPTIONS, *_IGNORED, "messages", "tools", "chat_template_kwargs", "max_completion_tokens"),
    {
        **_COMMON,
        **dict.fromkeys(("logprobs", "top_logprobs", "functions", "function_call", "audio"), _NOTHING),
        **dict.fromkeys(("reasoning_effort", "prediction"), _NOTHING),
        "response_format": ('{"type": "text"}',),
        "tool_choice": ('"auto"',),
        "parallel_tool_calls": ("true",),
        "modalities": ('["text"]',),
        "verbosity": ('"medium"',),
        "web_search_options": ("false",),
    },
)
COMPLETION: KnownFields = (
    (*_OPTIONS, *_IGNORED, "prompt"),
    {**_COMMON, "best_of": ("1",), "echo": _NOTHING, "logprobs": ("false",), "suffix": _NOTHING},
)


def body_of(raw: bytes) -> dict[str, Any]:
    """The fields of a JSON object without NaN, infinities and halves of surrogate pairs. Raises RequestError."""
    try:
        body = json.loads(raw, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON that can be read: {error}") from error
    if not isinstance(body, dict):
        raise RequestError("the body is not a JSON object")
    for name, value in body.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            readable = name.encode(errors="replace").decode()
            message = f"{readable} contains half of a surrogate pair, which is no character"
            raise RequestError(message, param=readable) from None
    return body


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def refuse_unsupported(body: Mapping[str, Any], fields: KnownFields) -> None:
    """Checks the names of the fields, and that those which have no effect ask for nothing. Raises RequestError."""
    known, others = fields
    for name, value in body.items():
        if value is None or name in known or (name in _OF_TOOLS and not body.get("tools")):
            continue
        if name not in others:
            raise RequestError(f"there is no field {name!r} here; leave it out", param=name)
        if json.dumps(value) not in others[name]:
            raise _wrong(name, value, "is not supported here; leave it out, or serve with --engine vllm")


def options_of(body: Mapping[str, Any], vocabulary: int) -> AnswerOptions:
    """The options of an answer by a policy with so many token ids. Raises RequestError."""
    limits = [_count(body, name) for name in ("max_completion_tokens", "max_tokens")]
    temperature = _number(body, "temperature", 1.0, 0.0, HOTTEST)
    if 0 < temperature < COLDEST:
        raise _wrong("temperature", temperature, f"is not 0, or from {COLDEST} to {HOTTEST:g}")
    seed = body.get("seed")
    if seed is not None and not (type(seed) is int and -_SEEDS <= seed < _SEEDS):
        raise _wrong("seed", seed, "is not a whole number of 64 bits")
    stream_options = body.get("stream_options")
    if stream_options is not None and not isinstance(stream_options, dict):
        raise _wrong("stream_options", stream_options, "is not an object")
    return AnswerOptions(
        max_tokens=next((limit for limit in limits if limit is not None), None),
        temperature=temperature,
        top_p=_number(body, "top_p", 1.0, 0.0, 1.0),
        seed=seed,
        bias=_bias(body.get("logit_bias"), vocabulary),
        stops=_stops(body.get("stop")),
        is_streamed=_flag(body, "stream"),
        streams_usage=_flag(stream_options or {}, "include_usage"),
    )


def _count(body: Mapping[str, Any], name: str) -> int | None:
    value = body.get(name)
    if value is not None and not (type(value) is int and value >= 1):
        raise _wrong(name, value, "is not a whole number of 1 or more")
    return value


def _number(body: Mapping[str, Any], name: str, usual: float, lowest: float, highest: float) -> float:
    value = body.get(name)
    if value is None:
        return usual
    if type(value) not in (int, float) or not lowest <= value <= highest:
        raise _wrong(name, value, f"is not a number from {lowest:g} to {highest:g}")
    return float(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, value, "is not true or false")
    return bool(value)


def _bias(value: Any, vocabulary: int) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong("logit_bias", value, "is not an object of token ids and numbers")
    for token in value:
        if not (_TOKEN_ID.fullmatch(token) and int(token) < vocabulary):
            raise RequestError(f"{_short(token)} is not a token id of this policy", param="logit_bias")
    return {
        int(token): _number({"logit_bias": bias}, "logit_bias", 0.0, -_BIAS, _BIAS) for token, bias in value.items()
    }


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise _wrong("stop", value, "is neither a text nor a list of texts, none of them empty")
    if len(stops) > MOST_STOPS:
        raise RequestError(f"{len(stops)} stops were given, but at most {MOST_STOPS} are allowed", param="stop")
    return tuple(stops)


def _wrong(name: str, value: Any, fault: str) -> RequestError:
    return RequestError(f"{name}={_short(value)} {fault}", param=name)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"


_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", *THOUGHTS)
_TEXTS = ("name", "tool_call_id", *THOUGHTS)


def prompt_of(body: Mapping[str, Any], tokenizer: Any, *, positions: int, reads_calls: bool) -> str:
    """The text of the conversation, ready for an answer. The context has so many ``positions``. ``reads_calls``: calls
    in an answer can be recognised. Raises RequestError."""
    tools = tools_of(body)
    messages = turns_of(body)
    if len(messages) > positions:  # refused before they are rendered, while other requests wait
        raise RequestError(f"{len(messages)} messages do not fit into the context of this policy", param="messages")
    template = tokenizer.get_chat_template(tools=list(tools) or None)
    if tools and not reads_tools(template):
        raise RequestError("the chat template of this policy has no place for tools; leave them out", param="tools")
    if tools and not reads_calls:
        message = "the form in which this policy calls tools is not known; serve with --engine vllm and --tool-parser"
        raise RequestError(message, param="tools")
    options = _template_options(body.get("chat_template_kwargs"), template)
    try:
        templates = with_options(template, options)
        return render(tokenizer, messages, answering=True, tools=tools, templates=templates)
    except AlignmentError as error:
        raise RequestError(error.message, param="messages") from error


def _template_options(value: Any, template: str) -> Mapping[str, Any]:
    """Options that the template reads. It cannot be replaced: it is part of the policy."""
    field = "chat_template_kwargs"
    if value is not None and not isinstance(value, dict):
        raise RequestError(f"{field} is not an object", param=field)
    read = sorted(options_of_template(template))
    for name, option in (value or {}).items():
        if name not in read:
            hint = suggestion(name, read) if read else "it has no options"
            raise RequestError(f"the chat template has no option {name!r}; {hint}", param=f"{field}.{name}")
        if not isinstance(option, (bool, int, float, str)):
            raise RequestError(f"{name!r} is not true, false, a number or a text", param=f"{field}.{name}")
    return value or {}


def tools_of(body: Mapping[str, Any]) -> Tools:
    """The tools of a request for chat templates. Raises RequestError if they are not functions with names."""
    return turns.tools_of(_RequestFields(body, where="", example=""))


def turns_of(body: Mapping[str, Any]) -> Sequence[Message]:
    """The messages of a request. Raises RequestError if one has a form that no chat template reads."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages is not a list of messages, or it is empty", param="messages")
    fields = _RequestFields(body, where="", example="")
    return [_turn(fields, message, f"messages[{number}]") for number, message in enumerate(messages)]


class _RequestFields(Fields):
    """Refuses a field of a request as a row's is refused."""

    def fail(self, field: str, problem: str) -> NoReturn:
        raise RequestError(f"{field} {problem}", param=field)


def _turn(fields: Fields, message: Any, where: str) -> Message:
    """As in rows of training, except that a content may be empty, and any turn may have the name of who speaks."""
    if not isinstance(message, dict):
        fields.fail(where, "is not an object with a role and a content")
    for name, value in message.items():
        if name not in _FIELDS and value not in (None, "", [], {}):
            fields.fail(f"{where}.{name}", "does not exist here; leave it out")
        if name in _TEXTS and not isinstance(value, (str, type(None))):
            fields.fail(f"{where}.{name}", "is not a text")
    content, calls = turns.text_and_calls(fields, f"{where}.content", message.get("content"))
    if calls or not isinstance(content, (str, type(None))) or (content is None and message.get("role") != "assistant"):
        fields.fail(f"{where}.content", "is neither a text nor a list of parts of the type text")
    turn = turns.turn_of(fields, where, {**message, "content": content or "…"})
    for number, call in enumerate(turn.tool_calls):
        if not isinstance(call["function"]["arguments"], dict):
            fields.fail(f"{where}.tool_calls[{number}]", "has arguments that are not a JSON object")
    name, call_id = (message.get(field) or "" for field in ("name", "tool_call_id"))
    return replace(turn, content=content or "", name=name, call_id=call_id)
