"""A language model learns to tell happier stories (as Ziegler et al. 2019 did with GPT-2), its KL in hand.

The reward is vaderSentiment's compound score of an answer of 40 tokens, from −1 (dark) to 1 (bright). At a fixed price
of KL the mean reward must rise to .8 within 15 nats a sequence. With the adaptive price the KL must settle at its
target of 6: over the last quarter of the updates, means of five updates stay within 6 ± 1.
Rates, batch size and prices were chosen on these seeds (docs/LOG.md, 2026-11-25); the bounds were not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from alignment.config.model import AdapterConfig, AdapterKind, Critic
from alignment.config.optim import Schedule
from alignment.stages.ppo.config import KlConfig, KlControl, PpoConfig, PpoOptimConfig
from tests.proofs.common import SEEDS, Claim, TokenRewards, each, ppo_stage
from tests.proofs.stories import Stories

TOKENS = 40
UPDATES = 70
LAST = 5  # updates whose mean is taken, so that 640 answers stand behind a figure

START = 0.45  # the mean reward begins below
REWARD = 0.8  # and ends above
MOST_KL = 15.0  # nats a sequence
TARGET, AROUND = 6.0, 1.0

FIXED = KlConfig(coefficient=0.025)
ADAPTIVE = KlConfig(control=KlControl.adaptive, coefficient=0.075, target=TARGET, horizon=2000)


def config(kl: KlConfig) -> PpoConfig:
    """All weights are trained, and the critic is a head on the policy.

    A price that steers needs a policy that still moves, so under it the rate stays as it is.
    """
    steers = kl.control is KlControl.adaptive
    return PpoConfig(
        reward=None,
        adapter=AdapterConfig(kind=AdapterKind.full),
        critic=Critic.shared,
        updates=UPDATES,
        ppo_epochs=2,
        max_new_tokens=TOKENS,
        missing_eos_penalty=0.0,  # the model never ends a story; every answer has 40 tokens
        value_clip=10.0,  # far from any value: the critic may move freely
        kl=kl,
        save_every=UPDATES + 1,
        optim=PpoOptimConfig(
            lr=3e-4 if steers else 4e-4,
            schedule=Schedule.constant if steers else Schedule.linear,
            batch_size=128,
            micro_batch_tokens=8192,
        ),
    )


def learned(folder: Path, stories: Stories, kl: KlConfig, *, seed: int) -> list[dict[str, Any]]:
    """What was logged, an entry an update."""
    judge = SentimentIntensityAnalyzer()
    stage = ppo_stage(
        folder,
        config(kl),
        base=stories.folder,
        prompts=stories.prompts(),
        end_id=stories.end_id,
        rewards=TokenRewards(sentiment=each(lambda _, answer: judge.polarity_scores(stories.text(answer))["compound"])),
        seed=seed,
    )
    return stage.train()


def run(folder: Path) -> list[Claim]:
    """A fixed and an adaptive price, three seeds each."""
    stories = Stories()
    fixed = [learned(folder / f"fixed-{seed}", stories, FIXED, seed=seed) for seed in SEEDS]
    steered = [learned(folder / f"adaptive-{seed}", stories, ADAPTIVE, seed=seed) for seed in SEEDS]
    scores = [[line["objective/score"] for line in lines] for lines in fixed]
    settled = [_settled(lines) for lines in steered]
    return [
        Claim(figure="mean reward, first update", values=tuple(score[0] for score in scores), at_most=START),
        Claim(
            figure="mean reward, last updates", values=tuple(_mean(score[-LAST:]) for score in scores), at_least=REWARD
        ),
        Claim(
            figure="KL of the last updates, nats a sequence",
            values=tuple(_mean([line["objective/kl"] for line in lines[-LAST:]]) for lines in fixed),
            at_most=MOST_KL,
        ),
        Claim(
            figure="adaptive price: lowest KL over the last quarter",
            values=tuple(min(means) for means in settled),
            at_least=TARGET - AROUND,
        ),
        Claim(
            figure="adaptive price: highest KL over the last quarter",
            values=tuple(max(means) for means in settled),
            at_most=TARGET + AROUND,
        ),
    ]


def _settled(lines: list[dict[str, Any]]) -> list[float]:
    """Means of every five updates in a row that lie in the last quarter."""
    kl = [line["objective/kl"] for line in lines[-(len(lines) // 4) :]]
    return [_mean(kl[start : start + LAST]) for start in range(len(kl) - LAST + 1)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
