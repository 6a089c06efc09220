"""A policy chooses the letter that it finds likeliest, as a slow forward of the written-out prompt does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from alignment.core.errors import NonFiniteError
from alignment.data.fields import Fields
from alignment.data.formats import FORMATS
from alignment.data.records import HeldOutPrompt
from alignment.evaluation.arms import sequence_logprobs
from alignment.evaluation.multiple_choice import LetterRows, choice_scores, letter_rows
from alignment.models.forward.flat import use_flat_attention
from tests.oracles import logprobs as oracle
from tests.templates import styled_tokenizer
from tests.tiny import tiny_model, tiny_tokenizer

CHOICES = (("On Monday", "On Sunday", "Never"), ("Yes", "No"), ("The hall", "The sea", "Nowhere", "Here"))


def rows(right: list[int]) -> list[HeldOutPrompt]:
    read = FORMATS["choices"].read
    questions = [
        {"question": f"Question {number}?", "choices": list(choices), "answer": answer}
        for number, (choices, answer) in enumerate(zip(CHOICES, right, strict=True))
    ]
    return [record for row in questions for record in HeldOutPrompt.of(read(Fields(row, where="x:1", example="")))]


def scores(model: Any, right: list[int], *, name: str = "base") -> list[float]:
    asked = letter_rows(tiny_tokenizer(), rows(right), lambda row: row.messages)
    return choice_scores(rows(right), asked, sequence_logprobs(model, *asked.flat()), name=name)


def likeliest(seed: int) -> list[int]:
    """The letter with the largest logit after the prompt, which is written out here as the tiny template does."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), seed=seed)
    best = []
    for number, choices in enumerate(CHOICES):
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=False))
        turns = [{"role": "user", "content": f"Question {number}?\n{listed}\nAnswer:"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([ids])).logits[0, -1].tolist()
        letters = [tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "ABCD"[: len(choices)]]
        assert all(len(letter) == 1 for letter in letters), "one token a letter"
        logprobs = [oracle.log_softmax(logits)[letter[0]] for letter in letters]
        best.append(logprobs.index(max(logprobs)))
    return best


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_row_counts_if_its_right_letter_is_the_likeliest(seed: int) -> None:
    tokenizer = tiny_tokenizer()
    best = likeliest(seed)
    model = tiny_model(vocab_size=len(tokenizer), seed=seed)
    use_flat_attention(model)
    others = [(letter + 1) % len(choices) for letter, choices in zip(best, CHOICES, strict=True)]
    for right, expected in ((best, [1.0, 1.0, 1.0]), (others, [0.0, 0.0, 0.0]), ([best[0], *others[1:]], [1.0, 0, 0])):
        assert scores(model, right) == expected


def test_choices_stand_behind_the_tools_of_their_row() -> None:
    tokenizer = styled_tokenizer("qwen")
    tool = {"type": "function", "function": {"name": "calendar", "parameters": {"type": "object"}}}
    (row, *_) = rows([0, 0, 0])
    asked = letter_rows(tokenizer, [replace(row, tools=(tool,))], lambda row: row.messages)
    turns = [{"role": "user", "content": "Question 0?\nA. On Monday\nB. On Sunday\nC. Never\nAnswer:"}]
    text = tokenizer.apply_chat_template(turns, tools=[tool], tokenize=False, add_generation_prompt=True)
    assert asked.prompts == [tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert asked.letters == [[tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "ABC"]]


@pytest.mark.parametrize(
    ("logprobs", "points"),
    [
        ([-1.0, -1.0, -2.0], [1 / 2, 1 / 2, 0.0]),
        ([-2.0, -1.0, -1.0], [0.0, 1 / 2, 1 / 2]),
        ([-1.0, -1.0, -1.0], [1 / 3, 1 / 3, 1 / 3]),
        ([-1.0, -2.0, -2.0], [1.0, 0.0, 0.0]),
    ],
)
def test_the_likeliest_letters_share_the_point(logprobs: list[float], points: list[float]) -> None:
    (row, *_) = rows([0, 0, 0])
    asked = LetterRows(prompts=[[1]], letters=[[[2], [3], [4]]])
    assert [choice_scores([replace(row, right=right)], asked, logprobs, name="base")[0] for right in range(3)] == points


def test_log_probabilities_that_are_not_finite_name_the_arm() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    torch.nn.init.constant_(model.get_output_embeddings().weight, torch.nan)
    use_flat_attention(model)
    with pytest.raises(NonFiniteError, match="stage:sft gives log-probabilities that are not finite"):
        scores(model, [0, 0, 0], name="stage:sft")
