"""What each token of an answer weighs in the loss of a policy: GRPO's length bias, which Dr. GRPO does not have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alignment.algos.group import group_centered, group_standardized
from alignment.training.rl.policy_objective import Average, PolicyLoss, PolicyObjective, Sampled
from tests.oracles.close import close

LENGTHS, LONGEST = [2, 8], 10
MASK = torch.arange(8) < torch.tensor(LENGTHS)[:, None]


def objective(average: Average, **changes: object) -> PolicyObjective:
    settings = {
        "average": average,
        "whole_answers": False,
        "clip": 0.2,
        "clip_high": 0.2,
        "max_new_tokens": LONGEST,
        "kl_in_loss": False,
        "entropy_coefficient": 0.0,
    }
    return PolicyObjective(**(settings | changes))  # type: ignore[arg-type]


def loss_of(
    wanted: PolicyObjective, logprobs: Tensor, *, advantages: Tensor | None = None, kl: float = 0.0
) -> PolicyLoss:
    """With the old policy and the reference as the policy is now, and an advantage of 1 for both answers."""
    old = logprobs.detach()
    sampled = Sampled(
        logprobs=old,
        reference_logprobs=old,
        advantages=MASK.double() if advantages is None else advantages,
        response_mask=MASK,
    )
    tokens = MASK.sum().double()
    return wanted.loss(
        logprobs, torch.zeros_like(old), sampled, kl_coefficient=kl, divisor=wanted.divisor(MASK), tokens=tokens
    )


@pytest.mark.parametrize(
    ("average", "whole", "short", "long"),
    [
        (Average.tokens, False, 1 / 10, 1 / 10),
        (Average.token_means, False, 1 / (2 * 2), 1 / (2 * 8)),
        (Average.constant_length, False, 1 / (2 * LONGEST), 1 / (2 * LONGEST)),
        (Average.token_sums, True, 1 / 2, 1 / 2),
    ],
    ids=["PPO", "GRPO", "Dr. GRPO", "RLOO"],
)
def test_a_token_of_a_long_answer_weighs_less_in_grpo_alone(
    average: Average, whole: bool, short: float, long: float
) -> None:
    """Two answers of equal reward, of two and of eight tokens (Liu et al. 2025, section 3.1: a wrong answer is
    punished less the longer it is)."""
    logprobs = torch.full((2, 8), -1.0, dtype=torch.float64, requires_grad=True)
    loss_of(objective(average, whole_answers=whole), logprobs).total.backward()
    expected = -torch.tensor([[short], [long]]) * MASK
    close(logprobs.grad, expected, rtol=1e-6)


def test_a_group_with_a_small_deviation_weighs_more_in_grpo_alone() -> None:
    """Dr. GRPO does not divide by the deviation of a prompt's scores (Liu et al. 2025: the bias of difficulty)."""
    scores = torch.tensor([0.0, 0.1, 0.0, 10.0], dtype=torch.float64)
    close(group_standardized(scores, 2).abs(), [0.7061075, 0.7061075, 0.7070968, 0.7070968], rtol=1e-5)
    close(group_centered(scores, 2).abs(), [0.05, 0.05, 5.0, 5.0])


def test_an_endless_divisor_gives_zero_and_finite_gradients() -> None:
    wanted = objective(Average.token_means, kl_in_loss=True, entropy_coefficient=0.5)
    logprobs = torch.full((2, 8), -1.0, requires_grad=True)
    endless = torch.tensor(float("inf"))
    sampled = Sampled(
        logprobs=logprobs.detach(),
        reference_logprobs=logprobs.detach() - 0.5,
        advantages=MASK.float(),
        response_mask=MASK,
    )
    loss = wanted.loss(logprobs, logprobs * 0.1, sampled, kl_coefficient=0.3, divisor=endless, tokens=endless)
    loss.total.backward()
    assert loss.total.item() == 0.0
    assert logprobs.grad.abs().max() == 0.0
