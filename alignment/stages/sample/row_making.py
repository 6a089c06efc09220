"""Makes rows of a prompt's scored answers, in formats that stages read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.data.records import Prompt
from alignment.stages.sample.config import SampleConfig, Select
from alignment.stages.sample.selection import Candidate, best, is_tied, labels, left_out, pairs

CHOSEN, REJECTED, GOOD, BAD = "chosen", "rejected", "good", "bad"
"""What an answer is in the rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OfPrompt:
    """The ``rows`` that were made of a prompt's answers; which of these were ``used`` as what, or ``left_out`` and why,
    by index; whether the usable ones are ``tied``."""

    rows: Sequence[Mapping[str, Any]]
    used: Mapping[int, str]
    left_out: Mapping[int, str]
    tied: bool


def rows_of_prompt(config: SampleConfig, prompt: Prompt, candidates: Sequence[Candidate]) -> OfPrompt:
    """Rows of the answers to a prompt, as ``config.select`` has it.

    An answer that is chosen in a row and rejected in another one counts as chosen.
    """
    reasons = left_out(candidates, ended_only=config.ended_only)
    scores = {index: answer.score for index, answer in enumerate(candidates) if index not in reasons}
    used: dict[int, str] = {}
    rows: list[dict[str, Any]] = []
    if config.select is Select.best:
        index = best(scores, config.threshold)
        if index is not None:
            used[index] = CHOSEN
            rows.append(_conversation(prompt, candidates[index]))
    elif config.select is Select.labels:
        for index, good in labels(scores, config.threshold).items():
            used[index] = GOOD if good else BAD
            rows.append(_labelled(prompt, candidates[index], good=good))
    else:
        for high, low in pairs(scores, every=config.select is Select.all_pairs, min_margin=config.min_margin):
            used = {low: REJECTED, **used, high: CHOSEN}
            rows.append(_pair(prompt, candidates[high], candidates[low]))
    return OfPrompt(rows=rows, used=used, left_out=reasons, tied=is_tied(scores))


def _conversation(prompt: Prompt, answer: Candidate) -> dict[str, Any]:
    turn = {"role": "assistant", "content": answer.text}
    row = _asked(prompt)
    return {**row, "messages": [*row["messages"], turn], "score": answer.score}


def _pair(prompt: Prompt, better: Candidate, worse: Candidate) -> dict[str, Any]:
    scores = {"chosen_score": better.score, "rejected_score": worse.score}
    return {**_asked(prompt), "chosen": better.text, "rejected": worse.text, **scores}


def _labelled(prompt: Prompt, answer: Candidate, *, good: bool) -> dict[str, Any]:
    return {**_asked(prompt), "completion": answer.text, "label": good, "score": answer.score}


def _asked(prompt: Prompt) -> dict[str, Any]:
    """The columns of the prompt; earlier turns of the assistant are not learned again."""
    turns = [
        {**turn.as_dict(), "weight": 0} if turn.role == "assistant" else turn.as_dict() for turn in prompt.messages
    ]
    labels_of_row = {name: value for name, value in (("id", prompt.id), ("task", prompt.task)) if value}
    tools = {"tools": [dict(tool) for tool in prompt.tools]} if prompt.tools else {}
    return {**labels_of_row, "messages": turns, **tools}
