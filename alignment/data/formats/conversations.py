"""Conversations and preference pairs in the forms in which people store them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from alignment.data.fields import Fields, is_text
from alignment.data.formats.form import (
    Format,
    answer_text,
    answers_of_whole,
    asked,
    example,
    has_question,
    holds,
    preferred,
    question_turns,
    starts_with_turn,
    with_system,
)
from alignment.data.formats.plain import ALPACA, QUESTION_ANSWER
from alignment.data.records import Answer, Example
from alignment.data.turns import Message, tools_of, turns_of
from alignment.records.votes import TIE

_WORDS = ("true", "false")
_LABELLED: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "messages": lambda row: starts_with_turn(row.get("messages")),
    "prompt": lambda row: holds(row, "prompt", "completion"),
    "conversations": lambda row: starts_with_turn(row.get("conversations")) and _is_one_of(row, *_WORDS, "1", "0"),
    "instruction": lambda row: ALPACA.fits(row) and _is_one_of(row, *_WORDS),
    "question": lambda row: QUESTION_ANSWER.fits(row) and _is_one_of(row, *_WORDS),
}
"""What a row with a label has besides, by the column that holds its prompt. Next to conversations, an instruction or a
question the label may be a class, such as a topic, so it must be true or false. Next to the latter two it may also be
the number of a class, so 1 and 0 do not count there."""
_ANSWERS = {"instruction": "output", "question": "answer"}
"""The column of the labelled answer, if it is not ``completion``."""


def _has_turns(row: Mapping[str, Any], field: str, key: str) -> bool:
    return starts_with_turn(row.get(field)) and key in row[field][0]


def _is_one_of(row: Mapping[str, Any], *labels: str) -> bool:
    return str(row["label"]).strip().lower() in labels


def _labelled_prompt(row: Mapping[str, Any]) -> str | None:
    if not holds(row, "label"):
        return None
    return next((column for column, fits in _LABELLED.items() if fits(row)), None)


def _labelled(fields: Fields) -> Example:
    turns, field = asked(fields, _labelled_prompt(fields.row))
    own = _ANSWERS.get(field, "completion")
    answer = own if fields.has(own) else "completion"
    if fields.has(answer):
        turns = (*turns, Message(role="assistant", content=answer_text(fields, answer)))
    return Example(fields=fields, turns=turns, good=fields.flag("label"), tools=tools_of(fields), field=field)


MESSAGES = Format(
    name="messages",
    summary="OpenAI's messages, with tools and tool calls",
    row='{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}',
    fits=lambda row: _has_turns(row, "messages", "role"),
    read=lambda fields: example(fields, "messages"),
)
SHAREGPT = Format(
    name="sharegpt",
    summary="ShareGPT's conversations, with from and value, system and tools",
    row='{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}',
    fits=lambda row: _has_turns(row, "conversations", "from") or _has_turns(row, "conversations", "role"),
    read=lambda fields: example(fields, "conversations"),
)
KTO = Format(
    name="kto",
    summary="one answer with a label: good or bad",
    row='{"prompt": "2 + 2?", "completion": "4.", "label": true}',
    fits=lambda row: _labelled_prompt(row) is not None,
    read=_labelled,
)
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_PAIR = ("chosen", "rejected")
_PAIR_OF_MESSAGES = ("chosen_messages", "rejected_messages")


def _whole(
    names: tuple[str, str], turns_in: Callable[[Fields, str], tuple[Message, ...]] = turns_of
) -> Callable[[Fields], Example]:
    """Reads two whole conversations in the columns ``names``."""

    def read(fields: Fields) -> Example:
        chosen, rejected = (turns_in(fields, name) for name in names)
        turns, answers = answers_of_whole(fields, chosen, rejected, names=names)
        turns = _with_prompt(fields, turns)
        return Example(fields=fields, turns=turns, answers=answers, tools=tools_of(fields), field=names[0])

    return read


def _with_prompt(fields: Fields, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns before the answers, with a system text and a prompt that stand in columns of their own. The prompt is
    added if the conversations continue it with an answer, and do not have it as a turn."""
    system, rest = (turns[:1], turns[1:]) if turns and turns[0].role == "system" else ((), turns)
    value = fields.row.get("prompt")
    if (not rest or rest[0].role == "assistant") and (is_text(value) or starts_with_turn(value)):
        prompt = question_turns(fields, "prompt")
        if prompt[-1].role != "assistant" and prompt[-1] not in rest:
            rest = (*(prompt[1:] if system and prompt[0].role == "system" else prompt), *rest)
    return with_system(fields, (*system, *rest))


def _has_whole(row: Mapping[str, Any], names: tuple[str, str]) -> bool:
    return all(starts_with_turn(row.get(name)) and len(row[name]) > 1 for name in names)


def _turns_in(fields: Fields, field: str) -> tuple[Message, ...]:
    r"""The turns of ``"\n\nHuman: …\n\nAssistant: …"``; the public file has empty turns."""
    text = fields.text(field)
    before, *speakers_and_texts = _SPEAKER.split(text)
    if before.strip() or not speakers_and_texts:
        fields.fail(field, f"must be a transcript that begins with 'Human:'; it is {text!r:.60}")
    turns = []
    for speaker, content in zip(speakers_and_texts[::2], speakers_and_texts[1::2], strict=True):
        if not content.strip():
            fields.set_aside(field, f"has an empty turn of the {speaker}")
        turns.append(Message(role=_ROLES[speaker], content=content.strip()))
    return tuple(turns)


PREFERENCE = Format(
    name="preference",
    summary="a prompt, and a chosen and a rejected answer to it",
    row='{"prompt": "2 + 2?", "chosen": "4.", "rejected": "5."}',
    fits=lambda row: holds(row, "chosen", "rejected") and has_question(row),
    read=lambda fields: example(
        fields, answers=lambda: preferred(answer_text(fields, "chosen"), answer_text(fields, "rejected"))
    ),
)
WHOLE = Format(
    name="chosen_rejected",
    summary="two whole conversations that differ in the last turn (UltraFeedback)",
    row=(
        '{"chosen": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4."}], '
        '"rejected": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "5."}]}'
    ),
    fits=lambda row: _has_whole(row, _PAIR),
    read=_whole(_PAIR),
)
WHOLE_MESSAGES = Format(
    name="chosen_messages",
    summary="two whole conversations in the columns chosen_messages and rejected_messages, with content in parts or "
    "as text (LLaMA-Factory)",
    row=(
        '{"chosen_messages": [{"role": "user", "content": [{"type": "text", "value": "2 + 2?"}]}, '
        '{"role": "assistant", "content": [{"type": "text", "value": "4."}]}], '
        '"rejected_messages": [{"role": "user", "content": [{"type": "text", "value": "2 + 2?"}]}, '
        '{"role": "assistant", "content": [{"type": "text", "value": "5."}]}]}'
    ),
    fits=lambda row: _has_whole(row, _PAIR_OF_MESSAGES),
    read=_whole(_PAIR_OF_MESSAGES),
)
TRANSCRIPTS = Format(
    name="hh",
    summary="two transcripts of Human and Assistant (Anthropic HH)",
    row=(r'{"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4.", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5."}'),
    fits=lambda row: all(isinstance(row.get(name), str) and row[name].lstrip().startswith("Human:") for name in _PAIR),
    read=_whole(_PAIR, _turns_in),
)
PAIRED = Format(
    name="stack_exchange",
    summary="a question with a better answer (response_j) and a worse one (response_k)",
    row='{"question": "2 + 2?", "response_j": "4.", "response_k": "5."}',
    fits=lambda row: holds(row, "question", "response_j", "response_k"),
    read=lambda fields: example(
        fields, answers=lambda: preferred(fields.text("response_j"), fields.text("response_k"))
    ),
)


def _votes(fields: Fields) -> list[Answer]:
    answers = fields.required("answers")
    if not isinstance(answers, Mapping) or len(answers) != 2:
        fields.fail("answers", f"must map the names of two arms to their answers; it is {answers!r:.60}")
    for arm, text in answers.items():
        if not is_text(text):
            fields.set_aside(f"answers.{arm}", "is empty")
    better = fields.text("preferred")
    if better == TIE:
        fields.set_aside("preferred", "says that the answers are tied")
    if better not in answers:
        fields.fail("preferred", f"must be one of {', '.join([*answers, TIE])}; it is {better!r:.60}")
    return [Answer(text=text, rank=float(arm == better)) for arm, text in answers.items()]


def _is_vote(row: Mapping[str, Any]) -> bool:
    answers = row.get("answers")
    return isinstance(answers, Mapping) and len(answers) == 2 and holds(row, "preferred") and has_question(row)


VOTES = Format(
    name="votes",
    summary="two answers by the names of their arms, and which one was preferred (written by align judge); ties are "
    "left out",
    row=(
        '{"messages": [{"role": "user", "content": "2 + 2?"}], "answers": {"dpo": "4.", "sft": "5."}, '
        '"preferred": "dpo"}'
    ),
    fits=_is_vote,
    read=lambda fields: example(fields, answers=lambda: _votes(fields)),
    author="annotator",
)
