"""ORPO on the rewards of the DPO proof reaches the minimum of its loss (Hong et al. 2024, eqs. 4, 6 and 7).

The paper gives no closed form of the best policy, but over one-token answers the loss is a function of a table of
probabilities. Its minimum is computed here in float64 by Newton's method on the table's logits, from the paper and not
from the code under test. A policy that only imitated the chosen answers would have their frequencies, which are far
from this minimum.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from alignment.stages.dpo.kind import DpoLoss
from tests.pairs import TokenizedPair
from tests.proofs.bandit import PROMPTS, VOCABULARY, Bandit, make_bandits
from tests.proofs.common import MODES, SEEDS, Claim
from tests.proofs.dpo import learned

OFTEN = 3  # tokens whose pairs are met three times as often
ODDS_WEIGHT = 1.0  # ten times the default, so that the odds count as much as the likelihood
NEWTON_STEPS = 50

ERROR = 0.01  # largest |π − π°| over prompts and tokens
APART = 0.03  # largest distance of π° from the start, and from the frequencies of chosen answers
FLAT = 1e-9  # largest slope of the loss at π°
EXCESS = 1e-3  # loss above its minimum, nats a pair


def counts(bandit: Bandit) -> Tensor:
    """``[prompts, chosen, rejected]`` number of pairs: token a before token b w_a times, and three times as often where
    one of them is among the first tokens.

    So the frequencies of chosen answers are not those by which a judge prefers them.
    """
    often = torch.arange(VOCABULARY) < OFTEN
    times = torch.where(often[:, None] | often[None, :], 3, 1) * (1 - torch.eye(VOCABULARY, dtype=torch.long))
    return bandit.strengths[:, :, None] * times


def pairs_of(numbers: Tensor) -> list[TokenizedPair]:
    """As many pairs as ``[prompts, chosen, rejected]`` numbers say."""
    return [
        TokenizedPair(prompt=list(prompt), chosen=[chosen], rejected=[rejected])
        for prompt, table in zip(PROMPTS, numbers.tolist(), strict=True)
        for chosen, row in enumerate(table)
        for rejected, number in enumerate(row)
        for _ in range(number)
    ]


def loss(logits: Tensor, pairs: Tensor) -> Tensor:
    """ORPO's loss of a table of logits, in nats a pair."""
    logprobs = logits.log_softmax(-1)
    probabilities = logprobs.exp()
    log_odds = logprobs - (1.0 - probabilities).log()
    gaps = log_odds[:, :, None] - log_odds[:, None, :]
    return (pairs * (-logprobs[:, :, None] + ODDS_WEIGHT * (1.0 + (-gaps).exp()).log())).sum()


def minimum(pairs: Tensor) -> tuple[Tensor, float]:
    """``[prompts, tokens]`` log-probabilities at the minimum, and the largest slope there."""
    size = len(PROMPTS) * VOCABULARY
    logits = torch.zeros(size, dtype=torch.float64)

    def flat_loss(flat: Tensor) -> Tensor:
        return loss(flat.view(len(PROMPTS), VOCABULARY), pairs)

    for _ in range(NEWTON_STEPS):
        slope = torch.func.grad(flat_loss)(logits)
        curvature = torch.func.hessian(flat_loss)(logits)
        # A constant can be added to a prompt's logits without any change, so the curvature has no inverse.
        logits = logits - torch.linalg.pinv(curvature, rtol=1e-10, hermitian=True) @ slope
    lowest = torch.linalg.eigvalsh(torch.func.hessian(flat_loss)(logits)).min()
    assert lowest > -1e-9, "a saddle or a maximum"
    slope = torch.func.grad(flat_loss)(logits)
    return logits.view(len(PROMPTS), VOCABULARY).log_softmax(-1), float(slope.abs().max())


def run(folder: Path) -> list[Claim]:
    """All weights and LoRA, three seeds each."""
    bandits = make_bandits(folder)
    numbers = [counts(bandit) for bandit in bandits]
    pairs = [of_bandit.double() / of_bandit.sum() for of_bandit in numbers]
    best, slopes = zip(*(minimum(of_bandit) for of_bandit in pairs), strict=True)
    imitated = [of_bandit.sum(-1) / of_bandit.sum((-1, -2))[:, None] for of_bandit in pairs]
    claims = [
        Claim(figure="slope at π°", values=slopes, at_most=FLAT),
        Claim(
            figure="largest |ref − π°|",
            values=tuple(distance(b.reference, at) for b, at in zip(bandits, best, strict=True)),
            at_least=APART,
        ),
        Claim(
            figure="largest |frequencies of chosen answers − π°|",
            values=tuple(distance(shown.log(), at) for shown, at in zip(imitated, best, strict=True)),
            at_least=APART,
        ),
    ]
    for mode in MODES[:2]:  # ORPO has no critic
        policies = [
            learned(
                folder / f"{mode.name}-{seed}",
                bandit,
                mode.adapter,
                pairs_of(of_bandit),
                seed=seed,
                loss={"loss": DpoLoss.orpo, "odds_weight": ODDS_WEIGHT},
            )
            for seed, bandit, of_bandit in zip(SEEDS, bandits, numbers, strict=True)
        ]
        claims += policy_claims(mode.name, policies, best, pairs)
    return claims


def policy_claims(name: str, policies: list[Tensor], best: tuple[Tensor, ...], pairs: list[Tensor]) -> list[Claim]:
    """How near each policy is to the minimum, in probabilities and in its loss."""
    errors = tuple(distance(policy, at) for policy, at in zip(policies, best, strict=True))
    excess = tuple(float(loss(p, of) - loss(at, of)) for p, at, of in zip(policies, best, pairs, strict=True))
    return [
        Claim(figure=f"{name}: largest |π − π°|", values=errors, at_most=ERROR),
        Claim(figure=f"{name}: loss above its minimum", values=excess, at_most=EXCESS),
    ]


def distance(logprobs: Tensor, others: Tensor) -> float:
    """Largest difference of two tables' probabilities."""
    return float((logprobs.exp() - others.exp()).abs().max())
