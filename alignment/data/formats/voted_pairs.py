"""Votes of people on two answers, as ``align judge`` writes them (alignment/records/votes.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignment.data.fields import Fields, is_text
from alignment.data.formats.form import PROMPTS, Format, asked, holds, is_question
from alignment.data.records import Answer, Example
from alignment.data.turns import tools_of
from alignment.records.votes import TIE


def _voted(fields: Fields) -> Example:
    turns, field = asked(fields)
    answers = fields.required("answers")
    if not isinstance(answers, Mapping) or len(answers) != 2:
        fields.fail("answers", f"must map the names of two arms to their answers; it is {answers!r:.60}")
    for arm, text in answers.items():
        if not is_text(text):
            fields.set_aside(f"answers.{arm}", "is empty")
    preferred = fields.text("preferred")
    if preferred == TIE:
        fields.set_aside("preferred", "says that the answers are tied")
    if preferred not in answers:
        fields.fail("preferred", f"must be one of {', '.join([*answers, TIE])}; it is {preferred!r:.60}")
    ranked = tuple(Answer(text=text, rank=float(arm == preferred)) for arm, text in answers.items())
    return Example(fields=fields, turns=turns, answers=ranked, tools=tools_of(fields), field=field)


def _is_vote(row: Mapping[str, Any]) -> bool:
    answers = row.get("answers")
    two = isinstance(answers, Mapping) and len(answers) == 2
    return two and holds(row, "preferred") and any(is_question(row.get(name)) for name in PROMPTS)


VOTES = Format(
    name="votes",
    summary="two answers by the names of their arms, and which one was preferred (written by align judge); ties are "
    "left out",
    row=(
        '{"messages": [{"role": "user", "content": "2 + 2?"}], "answers": {"dpo": "4.", "sft": "5."}, '
        '"preferred": "dpo"}'
    ),
    fits=_is_vote,
    read=_voted,
    author="annotator",
)
