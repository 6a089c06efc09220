"""The fields of a request to the default engine. What it cannot do is refused by name, never ignored."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_STOPS = 4
"""As many as OpenAI takes."""
COLDEST, HOTTEST = 0.01, 100.0
"""Temperatures above 0 between which float32 has no overflow."""
_BIAS = 100.0
_SEEDS = 2**63
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,8}")
_Asks = Callable[[Any], bool]
"""Whether a value asks for more than the field's absence does."""


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


def _other_than(usual: Any) -> _Asks:
    return lambda value: bool(value != usual)


def _is_not_text(value: Any) -> bool:
    return not isinstance(value, Mapping) or value.get("type") != "text"


_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields that change no answer."""
_OPTIONS = ("model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "logit_bias")
_UNSUPPORTED: Mapping[str, _Asks] = {"n": _other_than(1), "presence_penalty": bool, "frequency_penalty": bool}
_OF_TOOLS = ("tool_choice", "parallel_tool_calls")
"""Fields that mean nothing without tools."""
CHAT_FIELDS = (*_OPTIONS, *_IGNORED, "messages", "tools", "chat_template_kwargs", "max_completion_tokens")
CHAT_UNSUPPORTED: Mapping[str, _Asks] = {
    **_UNSUPPORTED,
    "logprobs": bool,
    "top_logprobs": bool,
    "response_format": _is_not_text,
    "tool_choice": _other_than("auto"),
    "parallel_tool_calls": _other_than(True),
    "functions": bool,
    "function_call": bool,
    "reasoning_effort": bool,
    "prediction": bool,
    "audio": bool,
    "modalities": _other_than(["text"]),
    "verbosity": _other_than("medium"),
    "web_search_options": _other_than(False),
}
COMPLETION_FIELDS = (*_OPTIONS, *_IGNORED, "prompt")
COMPLETION_UNSUPPORTED: Mapping[str, _Asks] = {
    **_UNSUPPORTED,
    "best_of": _other_than(1),
    "echo": bool,
    "logprobs": lambda value: value is not False,
    "suffix": bool,
}


def body_of(raw: bytes) -> dict[str, Any]:
    """The fields of a JSON object without NaN, infinities and halves of surrogate pairs.

    Raises:
        RequestError: the body is something else.
    """
    try:
        body = json.loads(raw, parse_constant=_finite, parse_float=_finite)
        if not isinstance(body, dict):
            raise RequestError("the body is not a JSON object")
        for name, value in body.items():
            if _has_half_a_character([name, value]):
                readable = name.encode(errors="replace").decode()
                raise RequestError(
                    f"{readable} contains half of a surrogate pair, which is no character", param=readable
                )
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON that can be read: {error}") from error
    return body


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def _has_half_a_character(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def refuse_unsupported(body: Mapping[str, Any], known: Sequence[str], unsupported: Mapping[str, _Asks]) -> None:
    """Checks the names of the fields; a field of ``unsupported`` may only ask for what its absence means.

    Raises:
        RequestError: a field asks for what is not supported, or is unknown.
    """
    for name, value in body.items():
        if value is None or name in known or (name in _OF_TOOLS and not body.get("tools")):
            continue
        asks_for_more = unsupported.get(name)
        if asks_for_more is None:
            raise RequestError(f"there is no field {name!r} here; leave it out", param=name)
        if asks_for_more(value):
            raise _wrong(name, value, "is not supported here; leave it out, or serve with --engine vllm")


def options_of(body: Mapping[str, Any], vocabulary: int) -> AnswerOptions:
    """The options of an answer by a policy with so many token ids.

    Raises:
        RequestError: an option has a value that it cannot have.
    """
    limits = [_count(body, name) for name in ("max_completion_tokens", "max_tokens")]
    temperature = _number(body, "temperature", 1.0, 0.0, HOTTEST)
    if 0 < temperature < COLDEST:
        raise _wrong("temperature", temperature, f"is not 0, or from {COLDEST} to {HOTTEST:g}")
    stream = _flag(body, "stream")
    stream_options = body.get("stream_options")
    if stream_options is not None and not isinstance(stream_options, dict):
        raise _wrong("stream_options", stream_options, "is not an object")
    return AnswerOptions(
        max_tokens=next((limit for limit in limits if limit is not None), None),
        temperature=temperature,
        top_p=_number(body, "top_p", 1.0, 0.0, 1.0),
        seed=_seed(body.get("seed")),
        bias=_bias(body.get("logit_bias"), vocabulary),
        stops=_stops(body.get("stop")),
        is_streamed=stream,
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


def _seed(value: Any) -> int | None:
    if value is not None and not (type(value) is int and -_SEEDS <= value < _SEEDS):
        raise _wrong("seed", value, "is not a whole number of 64 bits")
    return value


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
