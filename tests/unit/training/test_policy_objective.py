"""The policy's loss, and what each token weighs in it, also for answers that an engine sampled (tests/oracles)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.algos.ppo import group_centered, group_standardized, truncated_importance
from alignment.stages.ppo.objective import Average, PolicyLoss, PolicyObjective, Sampled
from tests.oracles import importance as oracle
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


ROW_LENGTHS, MOST, CAP, CLIP, CLIP_HIGH = [3, 6, 1, 4], 8, 1.1, 0.1, 0.2
ROW_MASK = torch.arange(6) < torch.tensor(ROW_LENGTHS)[:, None]
ADVANTAGES = [1.5, -0.7, 0.4, -2.0]
METHODS = {
    "ppo": (Average.tokens, False),
    "grpo": (Average.token_means, False),
    "dr_grpo": (Average.constant_length, False),
    "rloo": (Average.token_sums, True),
}


def drawn(seed: int, scale: float, around: Tensor | None = None) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    noise = scale * torch.randn(4, 6, generator=rng, dtype=torch.float64)
    return (noise - 2.0 if around is None else noise + around) * ROW_MASK


OLD = drawn(0, 0.5)
ENGINE = drawn(1, 0.3, OLD)
NEW = drawn(2, 0.2, OLD)


def _objective(method: str) -> PolicyObjective:
    average, whole = METHODS[method]
    changes = {"whole_answers": whole, "clip": CLIP, "clip_high": CLIP_HIGH, "max_new_tokens": MOST, "kl_in_loss": True}
    return objective(average, **changes)


def _loss_of(method: str, logprobs: Tensor, importance: Tensor | None, *, kl: float = 0.0) -> Any:
    wanted = _objective(method)
    sampled = Sampled(
        logprobs=OLD,
        reference_logprobs=OLD - 0.3 * ROW_MASK,
        advantages=torch.tensor(ADVANTAGES, dtype=torch.float64)[:, None] * ROW_MASK,
        response_mask=ROW_MASK,
        importance=importance,
    )
    return wanted.loss(
        logprobs,
        torch.zeros_like(OLD),
        sampled,
        kl_coefficient=kl,
        divisor=wanted.divisor(ROW_MASK).double(),
        tokens=ROW_MASK.sum().double(),
    )


def importance(method: str, engine: Tensor = ENGINE) -> Tensor:
    return truncated_importance(OLD, engine, ROW_MASK, cap=CAP, whole_answers=METHODS[method][1])


def rows(figures: Tensor) -> list[list[float]]:
    return [row[:length] for row, length in zip(figures.tolist(), ROW_LENGTHS, strict=True)]


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_and_its_gradient_are_weighted_by_the_truncated_ratio(method: str) -> None:
    weights = importance(method)
    assert 0.0 < float((weights[ROW_MASK] >= CAP - 1e-9).double().mean()) < 1.0, "the cap should bind somewhere"
    logprobs = NEW.clone().requires_grad_()
    loss = _loss_of(method, logprobs, weights)
    loss.total.backward()
    plain = NEW.clone().requires_grad_()
    expected = oracle.policy_loss(
        method,
        [row[:length] for row, length in zip(plain, ROW_LENGTHS, strict=True)],
        rows(OLD),
        rows(ENGINE),
        ADVANTAGES,
        cap=CAP,
        low=CLIP,
        high=CLIP_HIGH,
        longest=MOST,
        exp=torch.exp,
    )
    expected.backward()
    close(loss.policy, expected.detach())
    close(logprobs.grad, plain.grad)
    assert float(logprobs.grad[ROW_MASK].abs().max()) > 0


@pytest.mark.parametrize("method", METHODS)
def test_on_policy_answers_are_learned_as_without_an_engine(method: str) -> None:
    logprobs = [NEW.clone().requires_grad_() for _ in range(2)]
    losses = [
        _loss_of(method, logprobs[0], importance(method, OLD), kl=0.2),
        _loss_of(method, logprobs[1], None, kl=0.2),
    ]
    for loss in losses:
        loss.total.backward()
    assert torch.equal(losses[0].total, losses[1].total)
    assert torch.equal(logprobs[0].grad, logprobs[1].grad)


@pytest.mark.parametrize("method", METHODS)
def test_the_kl_in_the_loss_is_not_weighted(method: str) -> None:
    """It is that of the policy, whoever sampled; so are the ratios that are reported."""
    weighted, plain = _loss_of(method, NEW, importance(method), kl=0.5), _loss_of(method, NEW, None, kl=0.5)
    assert float(weighted.kl) == float(plain.kl)
    assert torch.equal(weighted.ratio, plain.ratio)
    assert float(weighted.policy) != float(plain.policy)
