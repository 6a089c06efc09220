"""One optimiser step as PPO's trainer takes it, against the papers' formulas in float64.

The oracle has nothing of the trainer but the weights before each step, the prompts and the answers: it computes
log-probabilities and values by transformers' own forward, row by row, and gradients by autograd (Schulman et al. 2017,
eq. 7 and 2016, eq. 16; Stiennon et al. 2020, section 3.4 for the KL in the reward; Huang et al. 2024, details 8, 15 and
20 for whitening and the clipped value).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.stages.ppo.config import KlConfig
from tests.oracles import gae as gae_oracle
from tests.oracles import masked as masked_oracle
from tests.unit.training.ppo_bench import END, PROMPTS, Bench, TokenRewards, optim
from tests.unit.training.ppo_steps import Plain, Rows, Weights, taken

BETA, GAMMA, LAMBDA, CLIP, VALUE_CLIP, COEFFICIENT, PENALTY, MAX_NORM = 0.3, 0.9, 0.8, 0.02, 0.01, 0.7, 0.75, 0.5


def score(answer: Sequence[int]) -> float:
    return sum(answer) / 16 - 2.0


@dataclass
class Figures:
    """The losses of a step, each summed over tokens and divided by their number, and the gradients of both."""

    policy: float
    value: float
    norm: float
    gradients: Weights
    bound: dict[str, float]


def oracle(reference: Plain, old: Plain, new: Plain, rows: Rows, **how: Any) -> Figures:
    with torch.no_grad():
        at_start, (before, old_values) = reference.says(rows)[0], old.says(rows)
    advantages, returns = targets(rows, before, at_start, old_values, **how)
    logprobs, values = map(torch.cat, new.says(rows))
    ratio = (logprobs - torch.cat(before)).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    policy = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    near = torch.minimum(torch.maximum(values, torch.cat(old_values) - VALUE_CLIP), torch.cat(old_values) + VALUE_CLIP)
    value = 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean()
    (policy + COEFFICIENT * value).backward()
    parts = [("policy." + name, p) for name, p in new.policy.named_parameters()]
    parts += [("value." + name, p) for name, p in new.value.named_parameters()]
    norm = float(torch.cat([p.grad.flatten() for _, p in parts]).norm())
    return Figures(
        policy=float(policy.detach()),
        value=float(value.detach()),
        norm=norm,
        gradients={name: p.grad * min(1.0, MAX_NORM / norm) for name, p in parts},
        bound={
            "policy": float((ratio * advantages > clipped * advantages).double().mean().detach()),
            "value": float(((near - returns) ** 2 > (values - returns) ** 2).double().mean()),
        },
    )


def targets(
    rows: Rows,
    before: list[Tensor],
    at_start: list[Tensor],
    values: list[Tensor],
    *,
    whiten: bool,
) -> tuple[Tensor, Tensor]:
    """Whitened advantages and returns of all tokens, one answer after another."""
    lengths = [len(answer) for _, answer in rows]
    mask = [[position < length for position in range(max(lengths))] for length in lengths]
    scores = [score(answer) - (0.0 if answer[-1] == END else PENALTY) for _, answer in rows]
    costs = padded([now - start for now, start in zip(before, at_start, strict=True)])
    rewards = gae_oracle.token_rewards(scores, costs, lengths, kl_coefficient=BETA)
    if whiten:
        rewards = masked_oracle.scaled(rewards, mask)
    gae_inputs = (rewards, padded(values), lengths)
    raw = gae_oracle.advantages(*gae_inputs, gamma=GAMMA, gae_lambda=LAMBDA)
    returns = gae_oracle.returns(*gae_inputs, gamma=GAMMA, gae_lambda=LAMBDA)
    whitened = masked_oracle.whitened(raw, mask)
    return flat(whitened, mask), flat(returns, mask)


def padded(rows: list[Tensor]) -> list[list[float]]:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).tolist()


def flat(rows: list[list[float]], mask: list[list[bool]]) -> Tensor:
    return torch.tensor(masked_oracle.counted(rows, mask), dtype=torch.float64)


@pytest.mark.parametrize("whiten", [True, False], ids=["whitened rewards", "plain rewards"])
def test_a_step_is_what_the_papers_say(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, whiten: bool
) -> None:
    """The second epoch of the second update: policy, old policy and reference are three, and every clip binds."""
    run = bench(
        updates=2,
        ppo_epochs=2,
        num_minibatches=1,
        prompts=PROMPTS,
        rewards=TokenRewards(lambda prompt, answer: score(answer)),
        kl=KlConfig(coefficient=BETA),
        gamma=GAMMA,
        gae_lambda=LAMBDA,
        clip=CLIP,
        value_clip=VALUE_CLIP,
        value_coefficient=COEFFICIENT,
        whiten_rewards=whiten,
        missing_eos_penalty=PENALTY,
        optim=optim(lr=3e-3, batch_size=16, micro_batch_tokens=40, max_grad_norm=MAX_NORM),
    )
    offset = run.roles.actor_critic.value.score_offset
    offset.zero_()  # a constant beside every value, which transformers' own model does not have
    trace = taken(run, monkeypatch)
    plain = [Plain(weights) for weights in trace.before]
    first, last = (
        oracle(plain[0], Plain(trace.before[2]), plain[step], trace.rows[1], whiten=whiten) for step in (2, 3)
    )
    assert all(0.05 < share < 0.95 for share in last.bound.values()), f"clips should bind somewhere: {last.bound}"
    assert last.norm > 1.2 * MAX_NORM, "the gradient should be clipped"
    assert {answer[-1] == END for _, answer in trace.rows[1]} == {True, False}
    figures = run.metrics()[1]
    assert figures["loss/policy"] == pytest.approx((first.policy + last.policy) / 2, rel=1e-3, abs=1e-5)
    assert figures["loss/value"] == pytest.approx((first.value + last.value) / 2, rel=1e-3)
    assert figures["grad_norm"] == pytest.approx(last.norm, rel=1e-3)
    for step, expected in ((2, first), (3, last)):
        assert trace.gradients[step].keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            error = (trace.gradients[step][name] - gradient).norm() / gradient.norm()
            assert float(error) < 1e-3, name
