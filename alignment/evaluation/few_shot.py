"""What untrained arms are asked behind: examples, which are exchanges of the training conversations, or a system
prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alignment.core.errors import DataError
from alignment.data.overlap import HeldOut, asked
from alignment.data.records import Conversation, HeldOutPrompt
from alignment.data.turns import Message


def draw_examples(
    conversations: Sequence[Conversation],
    held_out: Sequence[HeldOutPrompt],
    *,
    count: int,
    generator: torch.Generator,
    where: str,
) -> list[Message]:
    """``2 · count`` turns of as many exchanges: rows of one user turn and its answer, in random order.

    Rows with a system message or several turns are skipped, and so is every row that repeats half of a held-out prompt
    (alignment/data/overlap.py): an example must not give an answer away.

    Raises:
        DataError: there are fewer such rows than ``count``.
    """
    fitting = [row for row in conversations if [turn.role for turn in row.messages] == ["user", "assistant"]]
    near = {overlap.learned for overlap in HeldOut(map(asked, held_out)).overlaps(map(asked, fitting))}
    free = [row for row in fitting if row.where not in near]
    if len(free) < count:
        raise DataError(
            f"{count} examples are needed, but only {len(free)} of {len(conversations)} rows have one question with "
            f"its answer and repeat no held-out prompt",
            where=where,
            remedy="lower few_shot.count, or give few_shot.data more rows",
        )
    drawn = torch.randperm(len(free), generator=generator)[:count].tolist()
    return [turn for index in drawn for turn in free[index].messages]


def with_examples(messages: Sequence[Message], examples: Sequence[Message]) -> list[Message]:
    """The turns with the examples inserted after the leading system messages."""
    first = next((index for index, turn in enumerate(messages) if turn.role != "system"), len(messages))
    return [*messages[:first], *examples, *messages[first:]]


def with_system_prompt(messages: Sequence[Message], system_prompt: str) -> list[Message]:
    """The turns with the prompt appended to their system message, or as a new one."""
    system = [m.content for m in messages if m.role == "system"]
    turns = [m for m in messages if m.role != "system"]
    return [Message(role="system", content="\n".join([*system, system_prompt])), *turns]
