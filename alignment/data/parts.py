"""Content in parts: ``{"type": "text", "text": …}`` as OpenAI writes it, or with ``value`` as LLaMA-Factory does.

Tool calls of the latter are parts too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignment.data.fields import Fields


def text_and_calls(fields: Fields, at: str, content: Any) -> tuple[Any, list[Any]]:
    """The parts of text joined, and the calls of tools as they stand there; content without parts stays as it is.

    Raises:
        DataError: a part is of another kind, such as a picture.
    """
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
            fields.fail(at, f"must have parts of text, or of tool calls; it is {content!r:.60}")
    return "".join(texts), calls
