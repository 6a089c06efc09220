"""One arm: its prompts, its greedy answers, and what policy and reward model say about them."""

from __future__ import annotations

import pytest
import torch

from alignment.data.records import HeldOutPrompt
from alignment.data.turns import Message
from alignment.evaluation import arms
from alignment.evaluation.arms import (
    answer_and_score,
    read_answers,
    reward_scores,
    sequence_logprobs,
    source_text,
    with_style_prompt,
)
from alignment.evaluation.house_style import STYLE_PROMPT
from alignment.models.flat import use_flat_attention
from alignment.models.forward import install_scalar
from alignment.models.generate import generate
from tests.oracles import logprobs as oracle
from tests.oracles.close import close
from tests.tiny import tiny_model, tiny_scorer, tiny_tokenizer

PROMPTS = [[5, 9, 2, 7], [8], [3, 2, 6]]
ANSWERS = [[11, 2], [12, 13, 14], [2]]


def test_the_style_prompt_becomes_the_system_message() -> None:
    turns = [Message(role="user", content="Hi.")]
    assert with_style_prompt(turns) == [Message(role="system", content=STYLE_PROMPT), *turns]


def test_the_style_prompt_follows_a_system_message_that_is_there() -> None:
    turns = [Message(role="system", content="You help cats."), Message(role="user", content="Hi.")]
    assert with_style_prompt(turns) == [
        Message(role="system", content=f"You help cats.\n{STYLE_PROMPT}"),
        Message(role="user", content="Hi."),
    ]


def test_an_answer_may_draw_on_everything_but_the_assistants_own_turns() -> None:
    turns = [("system", "A"), ("user", "B"), ("assistant", "C"), ("user", "D")]
    assert source_text([Message(role=role, content=content) for role, content in turns]) == "A\nB\nD"


@pytest.mark.parametrize("tokens", [1, 12, 1000])
def test_the_log_probability_of_an_answer_is_the_sum_over_its_tokens(
    monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(arms, "TOKENS", tokens)
    model = tiny_model()
    expected = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        total = 0.0
        for place, token in enumerate(answer):
            logits = model(torch.tensor([[*prompt, *answer[:place]]])).logits[0, -1].tolist()
            total += oracle.log_softmax(logits)[token]
        expected.append(total)
    close(sequence_logprobs(model, PROMPTS, ANSWERS), expected)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("architecture", ["llama", "sliding"])
def test_answers_and_scores_come_in_the_order_of_the_prompts(architecture: str, batch_size: int) -> None:
    """By a model that reads a prompt once, and by one that cannot."""
    changes = {} if architecture == "llama" else {"sliding_window": 4}
    model = tiny_model("llama" if architecture == "llama" else "mistral", **changes)
    use_flat_attention(model)
    others = [[answer] * (place % 3) for place, answer in enumerate(ANSWERS)]
    told: list[int] = []
    found = answer_and_score(
        model,
        PROMPTS,
        others,
        max_new_tokens=4,
        end_ids=[2],
        batch_size=batch_size,
        with_own=True,
        progress=told.append,
    )
    assert told[-1] == len(PROMPTS)
    for prompt, texts, heard in zip(PROMPTS, others, found, strict=True):
        assert heard.ids == generate(model, [prompt], max_new_tokens=4, end_ids=[2], batch_size=1)[0]
        assert heard.own is not None
        expected = sequence_logprobs(model, [prompt] * (1 + len(texts)), [heard.ids, *texts])
        close([heard.own, *heard.others], expected)


@pytest.mark.parametrize("tokens", [1, 12, 1000])
def test_rewards_stand_at_the_last_token_whatever_the_batch(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(arms, "TOKENS", tokens)
    model = tiny_scorer()
    with torch.no_grad():
        expected = [
            model.score(model.base_model(torch.tensor([[*prompt, *answer]])).last_hidden_state[0, -1]).item()
            for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
        ]
    install_scalar(model)
    close(reward_scores(model, PROMPTS, ANSWERS), expected)


def test_answers_are_decoded_scored_and_know_whether_they_ended() -> None:
    tokenizer = tiny_tokenizer()
    rows = [
        HeldOutPrompt(messages=(Message(role="user", content=text),), facts=(("shop", "store"),))
        for text in ("When is the shop open?", "Who has the keys?")
    ]
    said = tokenizer("The shop is open.")["input_ids"]
    whole, cut = read_answers(tokenizer, rows, [[*said, tokenizer.eos_token_id], said])
    assert (whole.text, cut.text) == ("The shop is open.", "The shop is open.")
    assert (whole.ended, cut.ended) == (True, False)
    assert whole.gold.facts == 1.0
