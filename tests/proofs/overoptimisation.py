"""A reward model is pushed beyond what it knows, and the guard hands on the policy from before (Gao et al. 2022).

The gold rule likes cheerful words up to four an answer, and dislikes each one more. The story model writes one or two,
so the 2,000 pairs that the reward model learns from, a quarter of them labelled wrongly, hardly ever show too many: it
learns that more is better. PPO raises its score on and on, while gold rises, peaks and falls. With the guard, whose
second opinion is the gold rule, the stage hands on a policy near the peak. Both runs are drawn in
docs/overoptimisation.svg.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.config.optim import OptimConfig
from alignment.config.stage import Critic, GuardConfig, KlConfig, PpoConfig, PpoOptimConfig, RewardConfig
from alignment.models.generate import Sampling, generate
from alignment.models.load import Lineage, load_policy
from alignment.report.plots import Line
from alignment.stages import reward
from alignment.stages.pairs import TokenizedPair
from alignment.training.context import StageContext
from alignment.training.session import train
from tests.proofs.common import Claim, PpoStage, TokenRewards, Tokens, each, ppo_stage
from tests.proofs.drawing import draw
from tests.proofs.stories import Stories
from tests.tiny import BASE_SOURCE, tiny_spec

FIGURE = Path(__file__).parents[2] / "docs/overoptimisation.svg"
SEED = 0
FULL = AdapterConfig(kind=AdapterKind.full)
TOKENS = 40
PAIRS, HELD_OUT = 2000, 500
WRONG = 0.25  # share of labels that are flipped
UPDATES = 80
EVERY = 4  # updates between two looks of the guard
WATCHED = 256  # prompts that the guard holds out
SMOOTH = 5  # updates whose mean is taken

_CHEERFUL = """
happy happily smile smiled laugh laughed love loved fun play played friend friends nice good best great hug hugged
kind pretty beautiful proud excited yay thank
"""
CHEERFUL = frozenset(_CHEERFUL.split())
ENOUGH = 4

ACCURACY = 0.65  # of the reward model on pairs without wrong labels
RISE = 0.8  # of gold from the start to its peak
FALL = 1.0  # of gold from the peak to the end of the unguarded run, as a share of the rise
LATE = 0.9  # the proxy's rise at the end as a share of its highest: it does not fall with gold
NEAR_PEAK = 0.95  # gold of the policy that was handed on, as a share of the peak


def gold_of(text: str) -> float:
    """Rises by 1 with each cheerful word up to ``ENOUGH``, and falls by 1 with each one more."""
    count = sum(word in CHEERFUL for word in re.findall(r"[a-z]+", text.lower()))
    return float(min(count, 2 * ENOUGH - count))


def run(folder: Path) -> list[Claim]:
    """A reward model, PPO against it without the guard, and the same with it."""
    stories = Stories()
    gold = each(lambda _, answer: gold_of(stories.text(answer)))
    trainer, accuracy = _reward_model(folder / "reward", stories)
    rewards = TokenRewards(proxy=lambda prompts, answers: reward._scores(trainer, prompts, answers).tolist(), gold=gold)

    def stage(name: str, guard: GuardConfig) -> PpoStage:
        return ppo_stage(
            folder / name,
            _config(guard),
            base=stories.folder,
            prompts=stories.prompts(),
            end_id=stories.end_id,
            rewards=rewards,
            second_opinion=TokenRewards(gold=gold) if guard.every else None,
            seed=SEED,
        )

    free = _Curves(stage("free", GuardConfig()).train())
    guarded = stage("guarded", GuardConfig(every=EVERY, prompts=WATCHED))
    watched = _Curves(guarded.train())
    _draw(free, watched, guarded)
    prompts = stories.prompts()
    handed_on = _mean(gold(prompts, _answers(guarded.roles.policy, stories, prompts, seed=SEED + 1)))
    return [
        Claim(figure="the reward model's accuracy without wrong labels", values=(accuracy,), at_least=ACCURACY),
        Claim(figure="unguarded: gold from start to peak", values=(max(free.gold) - free.gold[0],), at_least=RISE),
        Claim(
            figure="unguarded: its fall from the peak to the end, as a share of that",
            values=((max(free.gold) - free.gold[-1]) / (max(free.gold) - free.gold[0]),),
            at_least=FALL,
        ),
        Claim(
            figure="unguarded: rise of the proxy at the end, as a share of its highest",
            values=((free.proxy[-1] - free.proxy[0]) / (max(free.proxy) - free.proxy[0]),),
            at_least=LATE,
        ),
        Claim(
            figure="guarded: gold of what is handed on, as a share of the peak",
            values=(handed_on / max(watched.gold),),
            at_least=NEAR_PEAK,
        ),
        Claim(
            figure="guarded: updates from the peak of what is handed on to the end",
            values=(UPDATES - float(guarded.trainer.guard.best_updates),),
            at_least=2 * EVERY,
        ),
    ]


def _config(guard: GuardConfig) -> PpoConfig:
    return PpoConfig(
        reward=None,
        adapter=FULL,
        critic=Critic.shared,
        updates=UPDATES,
        ppo_epochs=2,
        max_new_tokens=TOKENS,
        missing_eos_score=None,  # the model never ends a story; every answer has 40 tokens
        value_clip=10.0,  # far from any value: the critic may move freely
        kl=KlConfig(coefficient=0.02),  # too cheap to hold the policy back
        guard=guard,
        save_every=UPDATES + 1,
        optim=PpoOptimConfig(lr=1e-3, batch_size=64, micro_batch_tokens=8192),
    )


def _reward_model(folder: Path, stories: Stories) -> tuple[Any, float]:
    """The trainer of a reward model that has learned, and its accuracy on fresh pairs that the gold rule labelled."""
    found = Lineage(source=BASE_SOURCE, base=stories.folder, adapters=())
    rng = torch.Generator().manual_seed(SEED)
    pairs = _pairs(stories, load_policy(found, torch.float32), PAIRS + HELD_OUT)
    wrong = torch.rand(PAIRS, generator=rng) < WRONG
    learned = [_flipped(pair) if flip else pair for pair, flip in zip(pairs, wrong.tolist(), strict=False)]
    config = RewardConfig(
        adapter=FULL, optim=OptimConfig(lr=1e-3, batch_size=32, adam_eps=1e-5, micro_batch_tokens=8192), save_every=1000
    )
    context = StageContext(spec=tiny_spec(folder, config, base_path=stories.folder, seed=SEED), rank=0, world_size=1)
    trainer = reward._trainer(config, context, found, stories.tokenizer, learned)
    train(trainer, context, headline="loss")
    trainer.model.eval()
    held_out = pairs[PAIRS:]
    prompts = [pair.prompt for pair in held_out]
    better, worse = (
        reward._scores(trainer, prompts, answers)
        for answers in ([pair.chosen for pair in held_out], [pair.rejected for pair in held_out])
    )
    return trainer, float((better > worse).float().mean())


def _pairs(stories: Stories, policy: PreTrainedModel, number: int) -> list[TokenizedPair]:
    """Two answers of the policy to a prompt each time, the better one first; where gold is equal, there is no pair."""
    prompts = stories.prompts()
    pairs: list[TokenizedPair] = []
    for turn in range(100):
        sides = [_answers(policy, stories, prompts, seed=1000 + 2 * turn + side) for side in (0, 1)]
        for prompt, *answers in zip(prompts, *sides, strict=True):
            one, other = sorted(answers, key=lambda answer: -gold_of(stories.text(answer)))
            if gold_of(stories.text(one)) > gold_of(stories.text(other)):
                pairs.append(TokenizedPair(prompt=prompt, chosen=one, rejected=other))
        if len(pairs) >= number:
            break
    return pairs[:number]


def _flipped(pair: TokenizedPair) -> TokenizedPair:
    return TokenizedPair(prompt=pair.prompt, chosen=pair.rejected, rejected=pair.chosen)


def _answers(policy: Any, stories: Stories, prompts: Sequence[Tokens], *, seed: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(len(prompts), TOKENS, generator=rng, dtype=torch.float64)
    return generate(
        policy,
        prompts,
        max_new_tokens=TOKENS,
        end_ids=[stories.end_id],
        batch_size=256,
        sampling=Sampling(temperature=1.0, uniforms=uniforms),
    )


class _Curves:
    """What a run did: means of a few updates each, by the square root of the KL in nats a sequence."""

    def __init__(self, lines: Sequence[dict[str, Any]]) -> None:
        def smooth(name: str) -> list[float]:
            values = [float(line[name]) for line in lines]
            return [_mean(values[start : start + SMOOTH]) for start in range(len(values) - SMOOTH + 1)]

        self.proxy, self.gold = smooth("score/proxy"), smooth("score/gold")
        self.distance = [math.sqrt(max(0.0, kl)) for kl in smooth("objective/kl")]

    def line(self, label: str, values: Sequence[float]) -> Line:
        """Values by distance."""
        return Line(label=label, points=list(zip(self.distance, values, strict=True)))


def _draw(free: _Curves, watched: _Curves, guarded: PpoStage) -> None:
    best = guarded.trainer.guard.best_updates
    draw(
        FIGURE,
        {
            "Score of the reward model (the proxy)": [
                free.line("free", free.proxy),
                watched.line("guarded", watched.proxy),
            ],
            "Gold": [free.line("free", free.gold), watched.line("guarded", watched.gold)],
        },
        below=f"√KL to the reference, nats a sequence; the guard handed on the policy of update {best}",
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
