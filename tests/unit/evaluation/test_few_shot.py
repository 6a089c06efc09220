"""Examples before a prompt: exactly these texts, never one that is held out."""

from __future__ import annotations

import pytest
import torch

from alignment.core.errors import DataError
from alignment.data.records import Conversation, HeldOutPrompt
from alignment.data.tokens.tokenize import prompt_ids
from alignment.data.turns import Message
from alignment.evaluation.few_shot import draw_examples, with_examples
from tests.tiny import tiny_tokenizer


def turns(*contents: str) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    return tuple(Message(role=roles[index % 2], content=content) for index, content in enumerate(contents))


def conversation(number: int, *contents: str) -> Conversation:
    return Conversation(messages=turns(*contents), where=f"a.jsonl:{number}")


SECRET = "the ferry to Norra leaves at half past seven from pier two every day"
HELD_OUT = [HeldOutPrompt(messages=turns(f"Shorten this: {SECRET}"), where="h.jsonl:1")]


def draw(rows: list[Conversation], count: int, seed: int = 0) -> list[Message]:
    generator = torch.Generator().manual_seed(seed)
    return draw_examples(rows, HELD_OUT, count=count, generator=generator, where="stages.evaluate.few_shot")


def test_the_prompt_reads_system_then_examples_then_the_question() -> None:
    tokenizer = tiny_tokenizer()
    messages = [Message(role="system", content="Be brief."), Message(role="user", content="When?")]
    shown = with_examples(messages, turns("Where?", "In the hall.", "Who?", "Ida."))
    assert tokenizer.decode(prompt_ids(tokenizer, shown)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n"
        "<|im_start|>assistant\nIn the hall.<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\nIda.<|im_end|>\n"
        "<|im_start|>user\nWhen?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_examples_are_drawn_by_the_generator_without_repeats() -> None:
    rows = [conversation(number, f"Question {number}?", f"Answer {number}.") for number in range(30)]
    first, again, other = draw(rows, 3), draw(rows, 3), draw(rows, 3, seed=1)
    assert first == again
    assert first != other
    assert len({turn.content for turn in first}) == 6
    assert [turn.role for turn in first] == ["user", "assistant"] * 3


def test_no_example_gives_a_held_out_answer_away() -> None:
    near = conversation(1, f"Please say it politely: {SECRET}!", "The ferry leaves at 7:30.")
    same = conversation(2, f"Shorten this: {SECRET}", "It leaves at 7:30.")
    free = conversation(3, "Who has the keys?", "Ida has.")
    assert draw([near, same, free], 1) == [*free.messages]
    with pytest.raises(DataError, match="2 examples are needed, but only 1 of 3 rows"):
        draw([near, same, free], 2)


def test_rows_of_several_turns_or_with_a_system_message_are_passed_over() -> None:
    several = conversation(1, "Hi.", "Hello.", "When?", "Now.")
    system = Conversation(messages=(Message(role="system", content="Be odd."), *turns("Hi.", "Odd.")), where="a:2")
    plain = conversation(3, "Hi there.", "Good day.")
    assert draw([several, system, plain], 1) == [*plain.messages]
