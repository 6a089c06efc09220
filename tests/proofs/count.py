"""Answers of T tokens, rewarded by the number of A in them; the reference draws A with probability p every time.

The optimum draws A with π* = p·e^{1/β} / (1 − p + p·e^{1/β}) after every prefix and is worth
J* = T·β·log(1 − p + p·e^{1/β}). The score comes at the last token alone, so PPO has to find out which tokens earned it.
The policy is judged by enumerating all answers, and by π(A) after every prefix, the rarest of which has a share of 6 %.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

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

A, B, END, START = range(4)
LENGTH = 5
P = 0.25
BETA = 0.9
UPDATES = 150
ANSWERS = tuple(itertools.product((A, B), repeat=LENGTH))

BEST_A = P * math.exp(1 / BETA) / (1 - P + P * math.exp(1 / BETA))
BEST = LENGTH * BETA * math.log(1 - P + P * math.exp(1 / BETA))
REFERENCE = LENGTH * P  # what the reference is worth: it pays no KL

GAIN = 0.99  # share of what can be gained on the reference, and of J* itself
OUTSIDE = {Dtype.float32: 1e-6, Dtype.bfloat16: 1e-5}  # probability of any other token than A and B
VALUE_CLIP = 0.1
CLIPPED = 0.05  # of values, at least, in the update with the most: the clip binds
IID = 1e-6  # how far the reference's π(A) may be from p after any prefix

_CONSTANT, _FREE = 2.0, 8
"""The state's first channel is a constant, and the next few are zero until something is learned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    worth: float
    error: float
    outside: float

    @property
    def gain(self) -> float:
        return (self.worth - REFERENCE) / (BEST - REFERENCE)


def iid_policy(seed: int) -> PreTrainedModel:
    """Draws A with probability p and B otherwise, whatever went before; what it learns may depend on all of that.

    Attention and MLP read the tokens but write nothing yet. The head reads a channel that all tokens have in common,
    and some that are zero in all of them, into which training can write.
    """
    model = tiny_model(seed=seed, vocab_size=4, num_hidden_layers=1, tie_word_embeddings=False)
    layer, table, head = model.model.layers[0], model.model.embed_tokens.weight, model.lm_head.weight
    end = 1 + _FREE
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        table[:, 0] = _CONSTANT
        table[:, 1:end] = 0.0
        # All states have mean square 1, so the last norm leaves them as they are.
        table[:, end:] *= math.sqrt(table.shape[1] - _CONSTANT**2) / table[:, end:].norm(dim=-1, keepdim=True)
        head[:, 0] = torch.tensor([math.log(P), math.log(1 - P), -200.0, -200.0]) / _CONSTANT
        head[[END, START], 1:] = 0.0
        head[:, end:] = 0.0
    return model


def judged(policy: Tensor) -> Judged:
    """``policy`` is ``[answers, tokens, vocabulary]``: log-probabilities before each token of ``ANSWERS``."""
    answers = torch.tensor(ANSWERS)
    chosen = policy.gather(-1, answers[..., None]).squeeze(-1).sum(-1)  # [answers] log π
    count = (answers == A).sum(-1).double()
    reference = count * math.log(P) + (LENGTH - count) * math.log(1 - P)
    worth = (chosen.exp() * (count - BETA * (chosen - reference))).sum()
    error = (policy[..., A].exp() - BEST_A).abs().max()
    outside = 1.0 - policy[..., [A, B]].exp().sum(-1).min()
    return Judged(worth=float(worth), error=float(error), outside=float(outside))


def before_each_token(model: object) -> Tensor:
    """``[answers, tokens, vocabulary]`` log-probabilities of a model, for ``judged``."""
    return logprobs_after(model, [[START, *answer] for answer in ANSWERS])[:, :-1]


def learned(folder: Path, mode: Mode, *, updates: int, seed: int, dtype: Dtype = Dtype.float32) -> tuple[Tensor, float]:
    """The log-probabilities before each token after PPO, which starts from the i.i.d. policy, and the share of clipped
    values in the update with the most."""
    base = folder / "base"
    iid_policy(seed).save_pretrained(str(base))
    config = PpoConfig(
        reward=None,
        adapter=mode.adapter,
        critic=mode.critic,
        updates=updates,
        max_new_tokens=LENGTH,
        missing_eos_penalty=0.0,  # answers have exactly T tokens; none ever ends
        gae_lambda=1.0,  # the optimum is that of undiscounted returns, however good the critic is
        value_clip=VALUE_CLIP,
        kl=KlConfig(coefficient=BETA),
        save_every=updates + 1,
        optim=PpoOptimConfig(lr=2e-3, critic_lr=5e-3, batch_size=256, micro_batch_tokens=100_000),
    )
    stage = ppo_stage(
        folder,
        config,
        base=base,
        prompts=[(START,)],
        end_id=END,
        rewards=TokenRewards(count=each(lambda _, answer: float(sum(token == A for token in answer)))),
        seed=seed,
        dtype=dtype,
    )
    lines = stage.train()
    return before_each_token(stage.roles.policy), max(line["val/clipfrac"] for line in lines)


def run(folder: Path) -> list[Claim]:
    """Three ways to train in float32 and one in bfloat16, three seeds each."""
    starts = [before_each_token(iid_policy(seed)) for seed in SEEDS]
    away = tuple(float((start[..., A].exp() - P).abs().max()) for start in starts)
    task = [
        Claim(figure="(J* − J(ref)) / J*", values=((BEST - REFERENCE) / BEST,), at_least=0.2),
        Claim(figure="the reference: largest |π(A) − p| after any prefix", values=away, at_most=IID),
    ]
    return task + [claim for dtype, modes in IN_DTYPES for mode in modes for claim in _mode_claims(folder, mode, dtype)]


def _mode_claims(folder: Path, mode: Mode, dtype: Dtype) -> list[Claim]:
    name = titled(mode.name, dtype)
    runs = [learned(folder / f"{name}-{seed}", mode, updates=UPDATES, seed=seed, dtype=dtype) for seed in SEEDS]
    judgements, clipped = [judged(policy) for policy, _ in runs], tuple(share for _, share in runs)
    return [
        Claim(
            figure=f"{name}: (J(π) − J(ref)) / (J* − J(ref))", values=tuple(f.gain for f in judgements), at_least=GAIN
        ),
        Claim(figure=f"{name}: J(π) / J*", values=tuple(f.worth / BEST for f in judgements), at_least=GAIN),
        Claim(
            figure=f"{name}: largest |π(A) − π*(A)|", values=tuple(f.error for f in judgements), at_most=ERROR[dtype]
        ),
        Claim(
            figure=f"{name}: probability of other tokens",
            values=tuple(f.outside for f in judgements),
            at_most=OUTSIDE[dtype],
        ),
        Claim(figure=f"{name}: clipped values in the update with the most", values=clipped, at_least=CLIPPED),
    ]
