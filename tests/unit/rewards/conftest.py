"""Prompts with the rows that they come from, and one thread a test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from alignment.data.records import Prompt
from alignment.data.turns import Message
from alignment.rewards.scorers import Answers
from tests.tiny import tiny_tokenizer


def prompt(text: str = "When is the shop closed?", *, line: int = 1, **fields: Any) -> Prompt:
    row = {"messages": [{"role": "user", "content": text}], **fields}
    return Prompt(messages=(Message(role="user", content=text),), row=row, where=f"rows.jsonl:{line}")


def answers_to(prompts: Sequence[Prompt], texts: Sequence[str]) -> Answers:
    tokenizer = tiny_tokenizer()
    return Answers(
        prompt_ids=[tokenizer(question.messages[-1].content)["input_ids"] for question in prompts],
        answer_ids=[[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts],
        texts=texts,
        prompts=prompts,
        rows=range(len(prompts)),
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
