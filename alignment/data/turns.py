"""Turns of conversations in OpenAI's and ShareGPT's forms, with content as text or in parts. A part is ``{"type":
"text", "text": …}`` in OpenAI's form, or has ``value`` in LLaMA-Factory's, where tool calls are parts too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignment.data.fields import Fields, is_text


def text_and_calls(fields: Fields, at: str, content: Any) -> tuple[Any, list[Any]]:
    """The joined text parts, and the raw tool calls; content without parts is returned unchanged. Raises DataError: a
    part has another type, such as a picture."""
    if not isinstance(content, list):
        return content, []
    texts: list[str] = []
    calls: list[Any] = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        value = part.get("text", part.get("value")) if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(value, str):
            texts.append(value)
        elif kind == "tool_call" and value is not None:
            called = fields.parsed(f"{at}[{number}]", value)
            calls += called if isinstance(called, list) else [called]
        else:
            fields.fail(at, f"must have parts that are text or tool calls; it is {content!r:.60}")
    return "".join(texts), calls


THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Fields of an assistant's turn that hold its thought, in public files and in chat templates."""
OPEN, CLOSE = "<think>", "</think>"
"""What stands around a thought where it is part of the content."""
ROLES = ("system", "user", "assistant", "tool")
ROLES_OPENAI = {"developer": "system", "function": "tool", **{role: role for role in ROLES}}
_ROLES_SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def tagged(thought: str, content: str) -> str:
    """A thought between its tags, and the content behind it."""
    return f"{OPEN}\n{thought}\n{CLOSE}\n\n{content}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn: ``Message(role="user", content="Summarise: …")``. ``tool_calls`` are an assistant's, each ``{"type":
    "function", "function": {"name": …, "arguments": {…}}}``, with its ``id`` before that if the row has one. A tool's
    turn has the ``call_id`` and the ``name`` of the call that it answers, if the row has them; some templates refuse
    turns without. ``learned`` is False for a turn of the assistant that SFT reads but does not learn (``"weight": 0``,
    or ``"loss_weight": 0``). ``thought`` is what the assistant thought before it answered, if the row has it in a field
    of its own, one of ``THOUGHTS``."""

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    learned: bool = True
    thought: str = ""
    call_id: str = ""
    name: str = ""

    @property
    def whole(self) -> str:
        """The thought between its tags and the content, as one text."""
        return tagged(self.thought, self.content) if self.thought else self.content

    def as_dict(self) -> dict[str, Any]:
        """The form of OpenAI's files; rendering gives a chat template the thought in the form that it reads."""
        thought = {THOUGHTS[0]: self.thought} if self.thought else {}
        calls = {"tool_calls": list(self.tool_calls)} if self.tool_calls else {}
        of_call = {"tool_call_id": self.call_id, "name": self.name}
        answered = {key: value for key, value in of_call.items() if value}
        return {"role": self.role, "content": self.content, **thought, **calls, **answered}


def turns_of(fields: Fields, field: str) -> tuple[Message, ...]:
    """The turns in ``field``, in either form; a system turn may only come first. Raises DataError: names the turn and
    what is wrong with it."""
    value = fields.required(field)
    if not isinstance(value, list) or not value:
        fields.fail(field, f"must be a list of turns and not empty; it is {value!r:.60}")
    turns = tuple(turn_of(fields, f"{field}[{number}]", turn) for number, turn in enumerate(value))
    for number, turn in enumerate(turns):
        if turn.role == "system" and number > 0:
            fields.fail(f"{field}[{number}].role", "is 'system'; only the first turn may be")
    return turns


def turn_of(fields: Fields, at: str, turn: Any) -> Message:
    """One turn in either form; ``at`` names it in errors."""
    if not isinstance(turn, Mapping):
        fields.fail(at, f"must be an object with 'role' and 'content'; it is {turn!r:.60}")
    if "from" in turn and "role" not in turn:
        return _sharegpt(fields, at, turn)
    role = turn.get("role")
    if role not in ROLES_OPENAI:
        fields.fail(f"{at}.role", f"must be one of {', '.join(ROLES)}; it is {role!r:.60}")
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list):
        fields.fail(f"{at}.tool_calls", f"must be a list; it is {calls!r:.60}")
    content, calls_in_content = text_and_calls(fields, f"{at}.content", turn.get("content"))
    if not is_text(content) and not ((calls or calls_in_content) and content in ("", None)):
        fields.fail(f"{at}.content", f"must be text and not empty; it is {content!r:.60}")
    called = [(f"{at}.tool_calls", call) for call in calls] + [(f"{at}.content", call) for call in calls_in_content]
    return Message(
        role=ROLES_OPENAI[role],
        content=content or "",
        tool_calls=tuple(_call(fields, where, call) for where, call in called),
        learned=_learned(fields, at, turn, role=ROLES_OPENAI[role]),
        thought=_thought(fields, at, turn, role=ROLES_OPENAI[role]),
        call_id=_label(fields, at, turn, "tool_call_id") if ROLES_OPENAI[role] == "tool" else "",
        name=_label(fields, at, turn, "name") if ROLES_OPENAI[role] == "tool" else "",
    )


def tools_of(fields: Fields, field: str = "tools") -> tuple[Mapping[str, Any], ...]:
    """The tools of a row in the form for chat templates; empty if the field is absent or empty. Raises DataError: the
    field is not a list of objects with a name."""
    value = fields.row.get(field)
    if value in (None, "", []):
        return ()
    parsed = fields.parsed(field, value)
    if not isinstance(parsed, list):
        fields.fail(field, f"must be a list of tools; it is {value!r:.60}")
    tools = []
    for number, tool in enumerate(parsed):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not is_text(function.get("name")):
            fields.fail(f"{field}[{number}]", f"must be an object with a 'name'; it is {tool!r:.60}")
        tools.append({"type": "function", "function": dict(function)})
    return tuple(tools)


def _sharegpt(fields: Fields, at: str, turn: Mapping[str, Any]) -> Message:
    role, value = turn["from"], turn.get("value")
    if role not in _ROLES_SHAREGPT:
        fields.fail(f"{at}.from", f"must be one of {', '.join(_ROLES_SHAREGPT)}; it is {role!r:.60}")
    if not is_text(value):
        fields.fail(f"{at}.value", f"must be text and not empty; it is {value!r:.60}")
    learned = _learned(fields, at, turn, role=_ROLES_SHAREGPT[role])
    thought = _thought(fields, at, turn, role=_ROLES_SHAREGPT[role])
    if role != "function_call":
        return Message(role=_ROLES_SHAREGPT[role], content=str(value), learned=learned, thought=thought)
    called = fields.parsed(f"{at}.value", value)
    calls = tuple(_call(fields, f"{at}.value", call) for call in (called if isinstance(called, list) else [called]))
    return Message(role="assistant", content="", tool_calls=calls, learned=learned, thought=thought)


def _call(fields: Fields, at: str, call: Any) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not is_text(function.get("name")):
        fields.fail(at, f"must have a function with a 'name'; it is {call!r:.60}")
    arguments = fields.parsed(at, function.get("arguments") or {})
    own_id = {"id": label} if (label := _label(fields, at, call, "id")) else {}
    return {**own_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _label(fields: Fields, at: str, holder: Mapping[str, Any], key: str) -> str:
    """A text or a whole number that names a call, as text; empty if there is none."""
    value = holder.get(key)
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, int) or isinstance(value, bool):
        fields.fail(f"{at}.{key}", f"must be text; it is {value!r:.60}")
    return str(value)


def _thought(fields: Fields, at: str, turn: Mapping[str, Any], *, role: str) -> str:
    """The thought of an assistant's turn, or nothing. Other roles have none, whatever their columns are called."""
    values = {name: turn.get(name) for name in THOUGHTS} if role == "assistant" else {}
    for name, value in values.items():
        if value is not None and not isinstance(value, str):
            fields.fail(f"{at}.{name}", f"must be text; it is {value!r:.60}")
    return next((value for value in values.values() if value), "")


def _learned(fields: Fields, at: str, turn: Mapping[str, Any], *, role: str) -> bool:
    """Whether an assistant's turn is learned. Other turns never are; a file that asks for it is refused."""
    weights = {name: turn.get(name) for name in ("weight", "loss_weight")}  # null is how Parquet leaves a field out
    for name, weight in weights.items():
        if weight not in (None, 0, 1):
            fields.fail(f"{at}.{name}", f"must be 0 or 1; it is {weight!r:.60}")
    if role != "assistant":
        if weights["loss_weight"]:
            fields.fail(
                f"{at}.loss_weight", f"marks a turn of the {role} to be learned; only assistant turns can be learned"
            )
        return True
    return all(weight is None or bool(weight) for weight in weights.values())
