"""How the text of an answer is divided into its content, its thoughts and its calls of tools."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.cli.serving.utils import ToolCall, get_response_template, parse_assistant_message
from transformers.utils import logging

_LOG = logging.get_logger(__name__)


def set_answer_form(tokenizer: Any, model: PreTrainedModel, end_ids: Iterable[int]) -> None:
    """Lets the form that transformers knows for this kind of model end an answer at every end of the policy.

    By itself it knows the ends of the kind's first models, and returns any other as text. Of several texts, such as
    those before and after a call, it keeps the last. Models of other kinds have no form: their answers are text.
    """
    known = get_response_template(tokenizer, model)
    content = (known or {}).get("fields", {}).get("content")
    if content is None or "open" in content or "open_pattern" in content:
        return
    form = copy.deepcopy(known)
    ends = [re.escape(tokenizer.convert_ids_to_tokens(end)) for end in end_ids]
    literal = content.get("close", [])
    ends += [re.escape(text) for text in ([literal] if isinstance(literal, str) else literal)]
    pattern = rf"\s*(?:{'|'.join(ends)})"
    if "close_pattern" in content:
        pattern = f"{pattern}|{content['close_pattern']}"
    rest = {key: value for key, value in content.items() if key != "close"}
    form["fields"]["content"] = rest | {"close_pattern": pattern, "repeats": True, "join": "\n"}
    tokenizer.response_template = form


def divided(
    tokenizer: Any, model: PreTrainedModel, ids: Any, prompt_ids: Any, text: str, tools: Any
) -> tuple[str, str | None, list[ToolCall] | None]:
    """Content, thoughts and calls. An answer that cannot be divided, such as a call that was cut off, is all text."""
    try:
        content, thoughts, calls = parse_assistant_message(
            tokenizer, model, ids, input_ids=prompt_ids, cleaned_content=text, tools=tools
        )
    except (ValueError, KeyError, TypeError) as error:
        _LOG.error(f"an answer is returned as text, because it cannot be divided: {error}")
        return text, None, None
    return content, thoughts, calls
