"""One arm: its prompts, its greedy answers, and what policy and reward model say about them."""

from __future__ import annotations

import pytest
import torch

from alignment.data.turns import Message
from alignment.evaluation import arms
from alignment.evaluation.arms import (
    answer_and_score,
    read_answers,
    reward_scores,
    sequence_logprobs,
)
from alignment.evaluation.few_shot import with_system_prompt
from alignment.models.forward.causal import install_scalar
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import generate
from tests.oracles import logprobs as oracle
from tests.oracles.close import close
from tests.tiny import tiny_model, tiny_scorer, tiny_tokenizer

PROMPTS = [[5, 9, 2, 7], [8], [3, 2, 6]]
ANSWERS = [[11, 2], [12, 13, 14], [2]]


def test_a_system_prompt_becomes_the_system_message() -> None:
    turns = [Message(role="user", content="Hi.")]
    assert with_system_prompt(turns, "Be brief.") == [Message(role="system", content="Be brief."), *turns]


def test_a_system_prompt_follows_a_system_message_that_is_there() -> None:
    turns = [Message(role="system", content="You help cats."), Message(role="user", content="Hi.")]
    assert with_system_prompt(turns, "Be brief.") == [
        Message(role="system", content="You help cats.\nBe brief."),
        Message(role="user", content="Hi."),
    ]


@pytest.mark.parametrize("tokens", [1, 12, 1000])
def test_the_log_probability_of_an_answer_is_the_sum_over_its_tokens(
    monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(arms, "TOKENS", tokens)
    model = tiny_model()
    expected = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        total = 0.0
        for position, token in enumerate(answer):
            logits = model(torch.tensor([[*prompt, *answer[:position]]])).logits[0, -1].tolist()
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
    others = [[answer] * (index % 3) for index, answer in enumerate(ANSWERS)]
    reported: list[int] = []
    answers, scores = answer_and_score(
        model,
        PROMPTS,
        others,
        max_new_tokens=4,
        end_ids=[2],
        batch_size=batch_size,
        with_own=True,
        progress=reported.append,
    )
    assert reported == [min(3, done) for done in range(batch_size, 3 + batch_size, batch_size)]
    for prompt, texts, answer, logprobs in zip(PROMPTS, others, answers, scores, strict=True):
        assert answer == generate(model, [prompt], max_new_tokens=4, end_ids=[2], batch_size=1)[0]
        close(logprobs, sequence_logprobs(model, [prompt] * (1 + len(texts)), [answer, *texts]))


def test_prompts_are_read_once_for_answers_and_scores() -> None:
    model = tiny_model()
    use_flat_attention(model)
    read: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    options = {"max_new_tokens": 1, "end_ids": [2], "batch_size": 3, "with_own": True, "progress": lambda _: None}
    answer_and_score(model, PROMPTS, [[answer] for answer in ANSWERS], **options)
    own, others = len(PROMPTS), sum(map(len, ANSWERS))
    assert read == [sum(map(len, PROMPTS)), own + others]


def test_rewards_are_rounded_no_more_under_autocast_than_by_the_trunk() -> None:
    """The head computes in float32; rounded to bfloat16, answers would tie."""
    model = tiny_scorer().to(torch.bfloat16)
    model.score.float()
    install_scalar(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        states = [
            model.base_model(torch.tensor([[*prompt, *answer]])).last_hidden_state[0, -1]
            for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
        ]
        rewards = reward_scores(model, PROMPTS, ANSWERS)
    expected = [float(state.float() @ model.score.weight[0].detach()) for state in states]
    assert max(abs(a - b) for a, b in zip(rewards, expected, strict=True)) < 0.05
    assert all(score != float(torch.tensor(score).bfloat16()) for score in rewards)


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


def test_answers_are_decoded_and_know_whether_they_ended() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("The shop is open.")["input_ids"]
    whole, cut = read_answers(tokenizer, [[*ids, tokenizer.eos_token_id], ids])
    assert (whole.text, cut.text) == ("The shop is open.", "The shop is open.")
    assert (whole.ended, cut.ended) == (True, False)
