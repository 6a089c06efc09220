"""The messages that each arm of an evaluation is asked with, and the tokens of a reference answer to them. No model is
imported, so that they can be read before a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from alignment.config.evaluating import FEW_SHOT, PROMPTED
from alignment.core.errors import DataError
from alignment.data.records import Conversation, HeldOutPrompt
from alignment.data.tokens.rendering import Tools
from alignment.data.tokens.thoughts import without_thought
from alignment.data.tokens.tokenize import answer_ids
from alignment.data.turns import Message
from alignment.evaluation.few_shot import draw_examples, with_examples, with_system_prompt
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.shared.stage_rows import rows_of
from alignment.training.context import StageContext

Shown = Callable[[HeldOutPrompt], Sequence[Message]]
"""The messages that an arm is asked with, such as the row's behind a system prompt."""


def unchanged(row: HeldOutPrompt) -> Sequence[Message]:
    """What most arms are asked with: the row's own messages."""
    return row.messages


def shown_otherwise(config: EvaluateConfig, context: StageContext, rows: Sequence[HeldOutPrompt]) -> dict[str, Shown]:
    """How the arms are asked that get more than a row's own messages, by name.

    Raises:
        DataError: there are too few examples.
    """
    system_prompt = config.system_prompt or ""  # the plan refuses an arm that needs one without it
    shown: dict[str, Shown] = {PROMPTED: lambda row: with_system_prompt(row.messages, system_prompt)}
    if FEW_SHOT in config.arms:
        examples = _examples(config, context, rows)
        shown[FEW_SHOT] = lambda row: with_examples(row.messages, examples)
    return shown


def reference_ids(tokenizer: Any, messages: Sequence[Message], reference: str, tools: Tools) -> list[int]:
    """A reference in tokens: without its thought if that cannot follow the prompt, as with ``enable_thinking: false``.

    Raises:
        DataError: the reference cannot be rendered either way.
    """
    try:
        return answer_ids(tokenizer, messages, reference, tools)
    except DataError:
        answer = without_thought(Message(role="assistant", content=reference)).content
        if answer in ("", reference):
            raise
        return answer_ids(tokenizer, messages, answer, tools)


def _examples(config: EvaluateConfig, context: StageContext, rows: Sequence[HeldOutPrompt]) -> list[Message]:
    conversations = rows_of(context, Conversation, config.few_shot.data, field="few_shot.data")
    return draw_examples(
        conversations,
        rows,
        count=config.few_shot.count,
        generator=context.generator("few_shot"),
        where=f"stages.{context.spec.stage}.few_shot",
    )
