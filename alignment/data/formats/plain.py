"""Rows with one answer to a prompt, several answers of different rank, or only a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from alignment.data.fields import Fields, finite, is_number, is_text
from alignment.data.formats.form import (
    Format,
    answer_text,
    asked,
    example,
    has_question,
    holds,
    is_question,
    with_system,
)
from alignment.data.records import Answer, Example
from alignment.data.row_files import begins_texts
from alignment.data.turns import Message, tools_of

_TEXTS = ("text", "content", "response", "completion")
_SCORES = ("score", "overall_score", "rating", "rank")


def _answered(name: str, *, prompt: str) -> Any:
    def read(fields: Fields) -> Example:
        turns, field = asked(fields, prompt)
        turns = (*turns, Message(role="assistant", content=answer_text(fields, name)))
        return Example(fields=fields, turns=turns, tools=tools_of(fields), field=field)

    return read


def _answer(fields: Fields, number: int, completion: Any) -> Answer:
    """An object with a text, and a score (higher is better) or a rank (1 is best)."""
    at = f"completions[{number}]"
    if not isinstance(completion, Mapping):
        fields.fail(at, f"must be an object with a text and a score or rank; it is {completion!r:.60}")
    text = next((completion[name] for name in _TEXTS if is_text(completion.get(name))), None)
    if text is None:
        fields.fail(at, f"has no text under any of {', '.join(_TEXTS)}")
    named = {name: completion[name] for name in _SCORES if is_number(completion.get(name))}
    if not named:
        fields.fail(at, f"has no number under any of {', '.join(_SCORES)}")
    name, value = next(iter(named.items()))
    score = finite(value)
    if score is None:  # a fault only where answers are compared
        return Answer(text=text, rank=math.nan)
    return Answer(text=text, rank=-score) if name == "rank" else Answer(text=text, rank=score, score=score)


def _chosen(fields: Fields) -> list[Answer]:
    if isinstance(value := fields.required("choices"), str):
        fields.fail("choices", f"must be a list, or JSON of one; it is {value!r:.60}")
    choices = fields.items("choices")
    for number, choice in enumerate(choices):
        if not is_text(choice):
            fields.fail(f"choices[{number}]", f"must be text and not empty; it is {choice!r:.60}")
    right = _right_index(fields, [choice.strip() for choice in choices])
    return [Answer(text=choice, rank=float(number == right)) for number, choice in enumerate(choices)]


def _right_index(fields: Fields, choices: list[str]) -> int:
    """The index of the right choice; the answer is its text or its index, from 0, which is text in a CSV."""
    answer = fields.required("answer")
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            fields.fail("answer", f"is {answer}, but the indices of {len(choices)} choices are 0 to {len(choices) - 1}")
        return answer
    text = fields.text("answer").strip()
    texts = choices if text in choices else [str(index) for index in range(len(choices))]
    if text not in texts:
        fields.fail("answer", f"is {text!r:.60}, which is not one of the choices: {', '.join(map(repr, choices)):.200}")
    return texts.index(text)


def _questions(fields: Fields) -> Example:
    questions = fields.items("turns")
    for number, question in enumerate(questions):
        if not is_text(question):
            fields.fail(f"turns[{number}]", f"must be text and not empty; it is {question!r:.60}")
    first, *later = questions
    turns = with_system(fields, (Message(role="user", content=first),))
    return Example(fields=fields, turns=turns, later_turns=tuple(later), tools=tools_of(fields), field="turns")


RANKED = Format(
    name="ranked",
    summary="a prompt and several answers with scores (higher is better) or ranks (1 is best): every pair of them",
    row='{"prompt": "2 + 2?", "completions": [{"text": "4.", "score": 9}, {"text": "5.", "score": 1}]}',
    fits=lambda row: isinstance(row.get("completions"), list) and has_question(row),
    read=lambda fields: example(
        fields, answers=lambda: [_answer(fields, *completion) for completion in enumerate(fields.items("completions"))]
    ),
)
CHOICES = Format(
    name="choices",
    summary="a question, answers to choose from, and the right one or its index from 0 (MMLU)",
    row='{"question": "2 + 2?", "choices": ["5.", "4."], "answer": "4."}',
    fits=lambda row: (
        (isinstance(row.get("choices"), list) or begins_texts(row.get("choices")))
        and holds(row, "answer")
        and has_question(row)
    ),
    read=lambda fields: example(fields, answers=lambda: _chosen(fields)),
)
PROMPT_COMPLETION = Format(
    name="prompt_completion",
    summary="a prompt and its answer",
    row='{"prompt": "2 + 2?", "completion": "4."}',
    fits=lambda row: holds(row, "completion") and is_question(row.get("prompt")),
    read=_answered("completion", prompt="prompt"),
)
ALPACA = Format(
    name="alpaca",
    summary="an instruction and its output, optionally with input, system and history",
    row='{"instruction": "Add the numbers.", "input": "2 and 2", "output": "4."}',
    fits=lambda row: holds(row, "instruction", "output"),
    read=_answered("output", prompt="instruction"),
)
QUESTION_ANSWER = Format(
    name="question_answer",
    summary="a question and its answer, which may end in a number that can be checked (gsm8k)",
    row='{"question": "2 + 2?", "answer": "2 and 2 make 4.\\n#### 4"}',
    fits=lambda row: all(isinstance(row.get(name), str) for name in ("question", "answer")),
    read=_answered("answer", prompt="question"),
)
QUESTIONS = Format(
    name="turns",
    summary="questions to ask one after another: an evaluation asks all, other stages the first (MT-Bench)",
    row='{"turns": ["Write a haiku.", "Now without nouns."]}',
    fits=lambda row: isinstance(row.get("turns"), list),
    read=_questions,
)
PROMPT = Format(
    name="prompt",
    summary="a prompt without an answer",
    row='{"prompt": "Summarise: the shop is closed on Monday."}',
    fits=has_question,
    read=example,
)
TEXT = Format(
    name="text",
    summary="plain text",
    row='{"text": "The shop is closed on Monday."}',
    fits=lambda row: isinstance(row.get("text"), str),
    read=lambda fields: Example(fields=fields, text=fields.text("text"), field="text"),
)
