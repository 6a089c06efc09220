"""One-token answers: PPO reaches the closed-form optimum π* ∝ ref·exp(r/β), worth J* = β·log E_ref[exp(r/β)].

Every prompt has a random table of rewards r = log w, w a whole number from 1 to 3, so that a Bradley–Terry judge
prefers token a to b in the exact proportion w_a : w_b (tests/proofs/dpo.py). The policy is judged by enumeration,
not by samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment.config.model import Dtype
from alignment.stages.ppo.config import KlConfig, PpoConfig, PpoOptimConfig
from tests.proofs.common import (
    ERROR,
    IN_DTYPES,
    SEEDS,
    Claim,
    Mode,
    TokenRewards,
    each,
    logprobs_after,
    ppo_stage,
    titled,
)
from tests.tiny import tiny_model

VOCABULARY = 8
PROMPTS = ((1,), (5, 2), (3, 4, 6))
END = 2
BETA = 0.5
UPDATES = 100
MOST = 3  # the largest w: the best token is worth log 3 more than the worst

GAIN = 0.99  # share of what can be gained on the reference, and of J* itself
POSSIBLE = 0.1  # J* − J(ref), nats·β: below this there would be nothing to prove
VALUE_CLIP = 0.02
CLIPPED = 0.05  # of values, at least, in the update with the most: the clip binds
APART = 0.1  # largest |ref − π*|


@dataclass(frozen=True, kw_only=True, slots=True)
class Bandit:
    """``strengths [prompts, tokens]`` are the w; ``reference`` has the same shape: log-probabilities, float64. Stages
    learn it in ``dtype``."""

    base: Path
    strengths: Tensor
    reference: Tensor
    dtype: Dtype = Dtype.float32

    @property
    def rewards(self) -> Tensor:
        """``[prompts, tokens]``."""
        return self.strengths.double().log()

    @property
    def optimum(self) -> Tensor:
        """``[prompts, tokens]`` log π*."""
        return (self.reference + self.rewards / BETA).log_softmax(-1)

    def worth(self, policy: Tensor) -> float:
        """E_π[r] − β·KL(π ‖ ref), the mean over prompts; ``policy`` are log-probabilities."""
        return float((policy.exp() * (self.rewards - BETA * (policy - self.reference))).sum(-1).mean())

    def best(self) -> float:
        return float(BETA * (self.reference + self.rewards / BETA).logsumexp(-1).mean())

    def policy_of(self, model: object) -> Tensor:
        """``[prompts, tokens]`` log-probabilities of a model's first token."""
        return torch.stack([logprobs_after(model, [prompt])[0, -1] for prompt in PROMPTS])

    def error(self, policy: Tensor) -> float:
        return float((policy.exp() - self.optimum.exp()).abs().max())


def make_bandit(folder: Path, seed: int, dtype: Dtype = Dtype.float32, **changes: int) -> Bandit:
    """A random model of one layer as the reference, and random strengths; ``changes`` are sizes of the model."""
    model = tiny_model(seed=seed, vocab_size=VOCABULARY, num_hidden_layers=1, **changes).to(getattr(torch, dtype.value))
    rng = torch.Generator().manual_seed(seed)
    strengths = torch.randint(1, MOST + 1, (len(PROMPTS), VOCABULARY), generator=rng)
    reference = torch.stack([logprobs_after(model, [prompt])[0, -1] for prompt in PROMPTS])
    model.float().save_pretrained(str(folder))  # which loses nothing of weights in bfloat16
    return Bandit(base=folder, strengths=strengths, reference=reference, dtype=dtype)


def make_bandits(folder: Path, dtype: Dtype = Dtype.float32, **changes: int) -> list[Bandit]:
    return [make_bandit(folder / titled(f"base-{seed}", dtype), seed, dtype, **changes) for seed in SEEDS]


def learned(folder: Path, bandit: Bandit, mode: Mode, *, updates: int, seed: int) -> tuple[Tensor, float]:
    """``[prompts, tokens]`` log-probabilities after PPO, and the largest share of values clipped in an update."""
    policy, lines = trained(folder, bandit, ppo_config(mode, updates), seed)
    return policy, max(line["val/clipfrac"] for line in lines)


def ppo_config(mode: Mode, updates: int) -> PpoConfig:
    return PpoConfig(
        reward=None,
        adapter=mode.adapter,
        critic=mode.critic,
        updates=updates,
        max_new_tokens=1,
        missing_eos_penalty=0.0,  # every token is a whole answer here, whether it ends one or not
        value_clip=VALUE_CLIP,
        kl=KlConfig(coefficient=BETA),
        save_every=updates + 1,
        optim=PpoOptimConfig(lr=3e-3, critic_lr=1e-2, batch_size=256, micro_batch_tokens=100_000),
    )


def trained(folder: Path, bandit: Bandit, config: PpoConfig, seed: int) -> tuple[Tensor, list[dict[str, Any]]]:
    """``[prompts, tokens]`` log-probabilities after a PPO stage, and what it logged, one entry an update."""
    rewards = bandit.rewards.tolist()
    stage = ppo_stage(
        folder,
        config,
        base=bandit.base,
        prompts=PROMPTS,
        end_id=END,
        rewards=TokenRewards(table=each(lambda prompt, answer: rewards[PROMPTS.index(tuple(prompt))][answer[0]])),
        seed=seed,
        dtype=bandit.dtype,
    )
    lines = stage.train()
    return bandit.policy_of(stage.roles.policy), lines


def run(folder: Path) -> list[Claim]:
    """Three ways to train in float32 and one in bfloat16, three seeds each."""
    claims = []
    for dtype, modes in IN_DTYPES:
        bandits = make_bandits(folder, dtype)
        claims += task_claims(bandits)
        claims += [claim for mode in modes for claim in _mode_claims(folder / dtype.value, bandits, mode)]
    return claims


def task_claims(bandits: list[Bandit]) -> list[Claim]:
    possible = tuple(bandit.best() - bandit.worth(bandit.reference) for bandit in bandits)
    apart = tuple(bandit.error(bandit.reference) for bandit in bandits)
    return [
        Claim(figure=titled("J* − J(ref)", bandits[0].dtype), values=possible, at_least=POSSIBLE),
        Claim(figure=titled("largest |ref − π*|", bandits[0].dtype), values=apart, at_least=APART),
    ]


def _mode_claims(folder: Path, bandits: list[Bandit], mode: Mode) -> list[Claim]:
    runs = [
        learned(folder / f"{mode.name}-{seed}", bandit, mode, updates=UPDATES, seed=seed)
        for seed, bandit in zip(SEEDS, bandits, strict=True)
    ]
    clipped, name = tuple(share for _, share in runs), titled(mode.name, bandits[0].dtype)
    return [
        *policy_claims(mode.name, bandits, [policy for policy, _ in runs]),
        Claim(figure=f"{name}: clipped values in the update with the most", values=clipped, at_least=CLIPPED),
    ]


def policy_claims(name: str, bandits: list[Bandit], policies: list[Tensor]) -> list[Claim]:
    pairs, dtype = list(zip(bandits, policies, strict=True)), bandits[0].dtype
    name = titled(name, dtype)
    gains = tuple(gain(bandit, policy) for bandit, policy in pairs)
    return [
        Claim(figure=f"{name}: (J(π) − J(ref)) / (J* − J(ref))", values=gains, at_least=GAIN),
        Claim(figure=f"{name}: J(π) / J*", values=tuple(b.worth(p) / b.best() for b, p in pairs), at_least=GAIN),
        Claim(figure=f"{name}: largest |π − π*|", values=tuple(b.error(p) for b, p in pairs), at_most=ERROR[dtype]),
    ]


def gain(bandit: Bandit, policy: Tensor) -> float:
    start = bandit.worth(bandit.reference)
    return (bandit.worth(policy) - start) / (bandit.best() - start)
