"""Content in parts: ``{"type": "text", "text": …}`` in OpenAI's form, or with ``value`` in LLaMA-Factory's.

In LLaMA-Factory's form, tool calls are parts too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignment.data.fields import Fields


def text_and_calls(fields: Fields, at: str, content: Any) -> tuple[Any, list[Any]]:
    """The joined text parts, and the raw tool calls; content without parts is returned unchanged.

    Raises:
        DataError: a part has another type, such as a picture.
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
            fields.fail(at, f"must have parts that are text or tool calls; it is {content!r:.60}")
    return "".join(texts), calls
