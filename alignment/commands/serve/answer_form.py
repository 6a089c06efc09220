"""How the text of an answer is divided into its content, its thoughts and its calls of tools."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedModel
from transformers.cli.serving.utils import ToolCall, get_response_template, parse_assistant_message
from transformers.utils import logging

_LOG = logging.get_logger(__name__)
_CALL = "<tool_call>"
"""Opens a call, a JSON object, in the templates of Qwen and of models that follow it."""
_WITH_CALLS: Any = SimpleNamespace(config=SimpleNamespace(model_type="qwen3"))
"""Stands for a model whose calls have that form."""


def answer_reader(tokenizer: Any, model: PreTrainedModel, end_ids: Iterable[int], *, with_tools: bool) -> Any:
    """A copy of the tokenizer that divides answers in the form of this kind of model, if transformers knows it.

    ``with_tools``: where it knows none, calls are read in the form that the chat template writes. By itself,
    transformers knows the ends of the kind's first models, and returns any other as text. Of several texts, such as
    those before and after a call, it keeps the last. Without a form, an answer is all text.
    """
    reader = copy.copy(tokenizer)
    form = get_response_template(tokenizer, model)
    if form is None and with_tools and _writes_calls(tokenizer):
        form = get_response_template(tokenizer, _WITH_CALLS)
    if form is not None:
        reader.response_template = _with_ends(form, tokenizer, end_ids)
    return reader


def reads_calls(reader: Any) -> bool:
    """Whether calls are recognised in answers that this reader divides."""
    return "tool_calls" in (getattr(reader, "response_template", None) or {}).get("fields", {})


def _writes_calls(tokenizer: Any) -> bool:
    template = tokenizer.get_chat_template(tools=[{}])
    return _CALL in template and "<function=" not in template


def _with_ends(known: Mapping[str, Any], tokenizer: Any, end_ids: Iterable[int]) -> Mapping[str, Any]:
    content = known.get("fields", {}).get("content")
    if content is None or "open" in content or "open_pattern" in content:
        return known
    form = copy.deepcopy(dict(known))
    ends = [re.escape(tokenizer.convert_ids_to_tokens(end)) for end in end_ids]
    literal = content.get("close", [])
    ends += [re.escape(text) for text in ([literal] if isinstance(literal, str) else literal)]
    pattern = rf"\s*(?:{'|'.join(ends)})"
    if "close_pattern" in content:
        pattern = f"{pattern}|{content['close_pattern']}"
    rest = {key: value for key, value in content.items() if key != "close"}
    form["fields"]["content"] = rest | {"close_pattern": pattern, "repeats": True, "join": "\n"}
    return form


def divided(
    reader: Any, model: PreTrainedModel, ids: Any, prompt_ids: Any, text: str, tools: Any
) -> tuple[str, str | None, list[ToolCall]]:
    """Content, thoughts and calls. An answer that cannot be divided, such as a call that was cut off, is all text, and
    so is one without a ``reader``."""
    if reader is None:
        return text, None, []
    try:
        content, thoughts, calls = parse_assistant_message(
            reader, model, ids, input_ids=prompt_ids, cleaned_content=text, tools=tools
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        _LOG.error(f"an answer is returned as text, because it cannot be divided: {error}")
        return text, None, []
    return content, thoughts, calls or []
