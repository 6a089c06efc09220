"""The policy's loss on answers that an engine sampled, and its gradient, beside plain loops (tests/oracles)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.algos.importance import truncated_importance
from alignment.training.rl.policy_objective import Average, PolicyObjective, Sampled
from tests.oracles import importance as oracle
from tests.oracles.close import close

LENGTHS, LONGEST, CAP, CLIP, CLIP_HIGH = [3, 6, 1, 4], 8, 1.1, 0.1, 0.2
MASK = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
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
    return (noise - 2.0 if around is None else noise + around) * MASK


OLD = drawn(0, 0.5)
ENGINE = drawn(1, 0.3, OLD)
NEW = drawn(2, 0.2, OLD)


def objective(method: str) -> PolicyObjective:
    average, whole = METHODS[method]
    return PolicyObjective(
        average=average,
        whole_answers=whole,
        clip=CLIP,
        clip_high=CLIP_HIGH,
        max_new_tokens=LONGEST,
        kl_in_loss=True,
        entropy_coefficient=0.0,
    )


def loss_of(method: str, logprobs: Tensor, importance: Tensor | None, *, kl: float = 0.0) -> Any:
    wanted = objective(method)
    sampled = Sampled(
        logprobs=OLD,
        reference_logprobs=OLD - 0.3 * MASK,
        advantages=torch.tensor(ADVANTAGES, dtype=torch.float64)[:, None] * MASK,
        response_mask=MASK,
        importance=importance,
    )
    return wanted.loss(
        logprobs,
        torch.zeros_like(OLD),
        sampled,
        kl_coefficient=kl,
        divisor=wanted.divisor(MASK).double(),
        tokens=MASK.sum().double(),
    )


def importance(method: str, engine: Tensor = ENGINE) -> Tensor:
    return truncated_importance(OLD, engine, MASK, cap=CAP, whole_answers=METHODS[method][1])


def rows(figures: Tensor) -> list[list[float]]:
    return [row[:length] for row, length in zip(figures.tolist(), LENGTHS, strict=True)]


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_and_its_gradient_are_weighted_by_the_truncated_ratio(method: str) -> None:
    weights = importance(method)
    assert 0.0 < float((weights[MASK] >= CAP - 1e-9).double().mean()) < 1.0, "the cap should bind somewhere"
    logprobs = NEW.clone().requires_grad_()
    loss = loss_of(method, logprobs, weights)
    loss.total.backward()
    plain = NEW.clone().requires_grad_()
    expected = oracle.policy_loss(
        method,
        [row[:length] for row, length in zip(plain, LENGTHS, strict=True)],
        rows(OLD),
        rows(ENGINE),
        ADVANTAGES,
        cap=CAP,
        low=CLIP,
        high=CLIP_HIGH,
        longest=LONGEST,
        exp=torch.exp,
    )
    expected.backward()
    close(loss.policy, expected.detach())
    close(logprobs.grad, plain.grad)
    assert float(logprobs.grad[MASK].abs().max()) > 0


@pytest.mark.parametrize("method", METHODS)
def test_on_policy_answers_are_learned_as_without_an_engine(method: str) -> None:
    logprobs = [NEW.clone().requires_grad_() for _ in range(2)]
    losses = [
        loss_of(method, logprobs[0], importance(method, OLD), kl=0.2),
        loss_of(method, logprobs[1], None, kl=0.2),
    ]
    for loss in losses:
        loss.total.backward()
    assert torch.equal(losses[0].total, losses[1].total)
    assert torch.equal(logprobs[0].grad, logprobs[1].grad)


@pytest.mark.parametrize("method", METHODS)
def test_the_kl_in_the_loss_is_not_weighted(method: str) -> None:
    """It is that of the policy, whoever sampled; so are the ratios that are reported."""
    weighted, plain = loss_of(method, NEW, importance(method), kl=0.5), loss_of(method, NEW, None, kl=0.5)
    assert float(weighted.kl) == float(plain.kl)
    assert torch.equal(weighted.ratio, plain.ratio)
    assert float(weighted.policy) != float(plain.policy)
