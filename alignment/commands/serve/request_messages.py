"""The conversation of a request, as the policy's chat template rendered those that the policy was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignment.commands.serve.request_checks import RequestError
from alignment.config.faults import suggestion
from alignment.core.errors import AlignmentError
from alignment.core.files import parse_json
from alignment.data.templates import options_of, reads_tools, with_options
from alignment.data.tokens.rendering import Tools, render
from alignment.data.turns import ROLES_OPENAI, THOUGHTS, Message

_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", *THOUGHTS)
_TEXTS = ("name", "tool_call_id", *THOUGHTS)


def prompt_of(body: Mapping[str, Any], tokenizer: Any, *, positions: int, reads_calls: bool) -> str:
    """The text of the conversation, ready for an answer. The context has so many ``positions``. ``reads_calls``: calls
    in an answer can be recognised.

    Raises:
        RequestError: a part of the conversation has a wrong form, or the template cannot render it.
    """
    tools = tools_of(body.get("tools"))
    turns = turns_of(body.get("messages"))
    if len(turns) > positions:  # refused before they are rendered, while other requests wait
        raise RequestError(f"{len(turns)} messages do not fit into the context of this policy", param="messages")
    template = tokenizer.get_chat_template(tools=list(tools) or None)
    if tools and not reads_tools(template):
        raise RequestError("the chat template of this policy has no place for tools; leave them out", param="tools")
    if tools and not reads_calls:
        raise RequestError(
            "the form in which this policy calls tools is not known; serve with --engine vllm and --tool-parser",
            param="tools",
        )
    options = _template_options(body.get("chat_template_kwargs"), template)
    try:
        templates = with_options(template, options)
        return render(tokenizer, turns, answering=True, tools=tools, templates=templates)
    except AlignmentError as error:
        raise RequestError(error.message, param="messages") from error


def _template_options(value: Any, template: str) -> Mapping[str, Any]:
    """Options that the template reads. It cannot be replaced: it is part of the policy."""
    field = "chat_template_kwargs"
    if value is not None and not isinstance(value, dict):
        raise RequestError(f"{field} is not an object", param=field)
    read = sorted(options_of(template))
    for name, option in (value or {}).items():
        if name not in read:
            hint = suggestion(name, read) if read else "it has no options"
            raise RequestError(f"the chat template has no option {name!r}; {hint}", param=f"{field}.{name}")
        if not isinstance(option, (bool, int, float, str)):
            raise RequestError(f"{name!r} is not true, false, a number or a text", param=f"{field}.{name}")
    return value or {}


def tools_of(value: Any) -> Tools:
    """The tools of a request in the form for chat templates.

    Raises:
        RequestError: they are not a list of functions with names.
    """
    if value is not None and not isinstance(value, list):
        raise RequestError("tools is not a list", param="tools")
    for number, tool in enumerate(value or ()):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not (isinstance(function.get("name"), str) and function["name"]):
            raise RequestError("a tool is an object with a function, which has a name", param=f"tools[{number}]")
    return [{"type": "function", "function": tool["function"]} for tool in value or ()]


def turns_of(messages: Any) -> Sequence[Message]:
    """The messages of a request.

    Raises:
        RequestError: one has a form that no chat template reads.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages is not a list of messages, or it is empty", param="messages")
    return [_turn(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _turn(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise RequestError("a message is an object with a role and a content", param=where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES_OPENAI:
        raise RequestError(f"the role is none of {', '.join(ROLES_OPENAI)}", param=f"{where}.role")
    for name, value in message.items():
        if name not in _FIELDS and value not in (None, "", [], {}):
            raise RequestError(f"a message has no field {name!r} here; leave it out", param=f"{where}.{name}")
        if name in _TEXTS and not isinstance(value, (str, type(None))):
            raise RequestError(f"{name} is not a text", param=f"{where}.{name}")
    return Message(
        role=ROLES_OPENAI[role],
        content=_content(message.get("content"), f"{where}.content", may_be_absent=role == "assistant"),
        tool_calls=_calls(message.get("tool_calls"), f"{where}.tool_calls"),
        thought=next((message[name] for name in THOUGHTS if message.get(name)), ""),
        call_id=message.get("tool_call_id") or "",
        name=message.get("name") or "",
    )


def _content(content: Any, where: str, *, may_be_absent: bool) -> str:
    """The text; texts of several parts are joined as in rows of training."""
    if isinstance(content, str):
        return content
    if content is None and may_be_absent:
        return ""
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise RequestError("the content is neither a text nor a list of parts of the type text", param=where)
    return "".join(map(str, texts))


def _calls(calls: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if calls is not None and not isinstance(calls, list):
        raise RequestError("tool_calls is not a list", param=where)
    return tuple(_call(call, f"{where}[{number}]") for number, call in enumerate(calls or ()))


def _call(call: Any, where: str) -> Mapping[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError("a call has a function with a name", param=where)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except ValueError as error:
            raise RequestError(f"the arguments are not JSON: {error}", param=f"{where}.function.arguments") from error
    if not isinstance(arguments, dict):
        raise RequestError("the arguments are not a JSON object", param=f"{where}.function.arguments")
    called_id = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**called_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
