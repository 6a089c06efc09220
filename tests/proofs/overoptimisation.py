"""A reward model is pushed beyond what it knows, and the guard hands on the policy from before (Gao et al. 2022).

The gold rule likes cheerful words up to four an answer, and dislikes each one more. The story model writes one or two,
so the 2,000 pairs that the reward model learns from, a quarter of them labelled wrongly, hardly ever show too many: it
learns that more is better. PPO raises its score on and on, while gold rises, peaks and falls. The guard's held-out
scorer is not the gold rule: it is a grader who gives whole grades, off by a standard deviation of one, so that its
grades of the untrained model's answers correlate with gold by well under .9. With this guard the stage hands on a
policy near the peak. Where the peak is, many answers of the policies on the way say; the guard decides by fewer. Both
runs of the first seed are drawn in docs/overoptimisation.svg.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.config.model import AdapterConfig, AdapterKind, Critic
from alignment.config.optim import OptimConfig
from alignment.config.scoring import GuardConfig
from alignment.models.assembly.load import Lineage, load_policy
from alignment.models.forward.generate import Sampling, generate
from alignment.report.kit.plots import Line
from alignment.stages.ppo.config import KlConfig, PpoConfig, PpoOptimConfig
from alignment.stages.reward import run as reward
from alignment.stages.reward.kind import RewardConfig
from alignment.training.context import StageContext
from alignment.training.session import train
from tests.pairs import TokenizedPair, as_table
from tests.proofs.common import SEEDS, Claim, PpoStage, Scores, TokenRewards, Tokens, each, ppo_stage
from tests.proofs.drawing import draw
from tests.proofs.stories import Stories
from tests.tiny import BASE_SOURCE, tiny_spec

FIGURE = Path(__file__).parents[2] / "docs/overoptimisation.svg"
FULL = AdapterConfig(kind=AdapterKind.full)
TOKENS = 40
PAIRS, HELD_OUT = 2000, 500
WRONG = 0.25  # share of labels that are flipped
UPDATES = 80
EVERY = 4  # updates between two looks of the guard
WATCHED = 256  # prompts that the guard holds out
SMOOTH = 5  # updates whose mean is taken
MEASURED = 4  # answers to each of the 512 prompts that measure a policy on the way

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
NEAR_PEAK = 0.9  # gold of the policy that was handed on, as a share of the peak; a standard error of 256 grades is .05
GRADER_NOISE = 1.0  # standard deviation of a grade around gold
GRADER_CORRELATION = 0.9  # at most: above, the grader would be the gold rule by another name


def gold_of(text: str) -> float:
    """Rises by 1 with each cheerful word up to ``ENOUGH``, and falls by 1 with each one more."""
    count = sum(word in CHEERFUL for word in re.findall(r"[a-z]+", text.lower()))
    return float(min(count, 2 * ENOUGH - count))


def grade_of(text: str) -> float:
    """Gold as a grader sees it: a whole grade, off by ``GRADER_NOISE``, and the same for the same text."""
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return float(round(gold_of(text) + random.Random(digest).gauss(0.0, GRADER_NOISE)))


class _Curves:
    def __init__(self, lines: Sequence[dict[str, Any]]) -> None:
        def smooth(name: str) -> list[float]:
            values = [float(line[name]) for line in lines]
            return [_mean(values[start : start + SMOOTH]) for start in range(len(values) - SMOOTH + 1)]

        self.proxy, self.gold = smooth("score/proxy"), smooth("score/gold")
        self.distance = [math.sqrt(max(0.0, kl)) for kl in smooth("objective/kl")]

    def line(self, label: str, values: Sequence[float]) -> Line:
        return Line(label=label, points=list(zip(self.distance, values, strict=True)))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """A reward model, PPO against it without the guard, and the same with it.

    ``free_gold`` and ``guarded_gold`` are measured on policies on the way, ``handed_on`` on the one that was handed on.
    """

    accuracy: float
    correlation: float
    free: _Curves
    watched: _Curves
    free_gold: list[float]
    guarded_gold: list[float]
    handed_on: float
    best_updates: int


def run(folder: Path) -> list[Claim]:
    """Both runs, from every seed."""
    stories = Stories()
    seen = [_see(folder / str(seed), stories, seed) for seed in SEEDS]
    _draw(seen[0])

    def of_each(figure: Callable[[_Seen], float]) -> tuple[float, ...]:
        return tuple(figure(of_seed) for of_seed in seen)

    def rise(of_seed: _Seen) -> float:
        return max(of_seed.free_gold) - of_seed.free_gold[0]

    return [
        Claim(
            figure="the reward model's accuracy without wrong labels",
            values=of_each(lambda of_seed: of_seed.accuracy),
            at_least=ACCURACY,
        ),
        Claim(
            figure="correlation of the guard's grader with gold on the untrained model's answers",
            values=of_each(lambda of_seed: of_seed.correlation),
            at_most=GRADER_CORRELATION,
        ),
        Claim(figure="unguarded: gold from start to peak", values=of_each(rise), at_least=RISE),
        Claim(
            figure="unguarded: its fall from the peak to the end, as a share of that",
            values=of_each(lambda of_seed: (max(of_seed.free_gold) - of_seed.free_gold[-1]) / rise(of_seed)),
            at_least=FALL,
        ),
        Claim(
            figure="unguarded: rise of the proxy at the end, as a share of its highest",
            values=of_each(
                lambda of_seed: (
                    (of_seed.free.proxy[-1] - of_seed.free.proxy[0]) / (max(of_seed.free.proxy) - of_seed.free.proxy[0])
                )
            ),
            at_least=LATE,
        ),
        Claim(
            figure="guarded: gold of what is handed on, as a share of the peak",
            values=of_each(lambda of_seed: of_seed.handed_on / max(of_seed.guarded_gold)),
            at_least=NEAR_PEAK,
        ),
        Claim(
            figure="guarded: updates from the peak of what is handed on to the end",
            values=of_each(lambda of_seed: float(UPDATES - of_seed.best_updates)),
            at_least=2 * EVERY,
        ),
    ]


def _see(folder: Path, stories: Stories, seed: int) -> _Seen:
    gold = each(lambda _, answer: gold_of(stories.text(answer)))
    grade = each(lambda _, answer: grade_of(stories.text(answer)))
    proxy, accuracy = _reward_model(folder / "reward", stories, seed)
    rewards = TokenRewards(proxy=proxy, gold=gold)

    def stage(name: str, guard: GuardConfig) -> PpoStage:
        return ppo_stage(
            folder / name,
            _config(guard),
            base=stories.folder,
            prompts=stories.prompts(),
            end_id=stories.end_id,
            rewards=rewards,
            held_out_scorer=TokenRewards(grade=grade) if guard.every else None,
            seed=seed,
        )

    prompts = stories.prompts() * MEASURED

    def watched(trained: PpoStage) -> _OnTheWay:
        def measured() -> float:
            return _mean(gold(prompts, _answers(trained.roles.policy, stories, prompts, seed=seed + 1)))

        way = _OnTheWay(measured, every=EVERY * trained.trainer.steps_per_update)
        trained.trainer.add_callback(way)
        return way

    free = stage("free", GuardConfig())
    untrained = _answers(free.roles.policy, stories, prompts, seed=seed + 1)
    correlation = statistics.correlation(gold(prompts, untrained), grade(prompts, untrained))
    guarded = stage("guarded", GuardConfig(every=EVERY, prompts=WATCHED))
    free_way, guarded_way = watched(free), watched(guarded)
    return _Seen(
        accuracy=accuracy,
        correlation=correlation,
        free=_Curves(free.train()),
        watched=_Curves(guarded.train()),
        free_gold=free_way.gold,
        guarded_gold=guarded_way.gold,
        handed_on=guarded_way.measure(),
        best_updates=guarded.trainer.guard.best_updates,
    )


class _OnTheWay(TrainerCallback):
    def __init__(self, measure: Callable[[], float], *, every: int) -> None:
        self.gold: list[float] = []
        self.measure = measure
        self._every = every

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.gold.append(self.measure())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self._every == 0:
            self.gold.append(self.measure())


def _config(guard: GuardConfig) -> PpoConfig:
    return PpoConfig(
        reward=None,
        adapter=FULL,
        critic=Critic.shared,
        updates=UPDATES,
        ppo_epochs=2,
        max_new_tokens=TOKENS,
        missing_eos_penalty=0.0,  # the model never ends a story; every answer has 40 tokens
        value_clip=10.0,  # far from any value: the critic may move freely
        kl=KlConfig(coefficient=0.0),  # nothing holds the policy back
        guard=guard,
        save_every=UPDATES + 1,
        optim=PpoOptimConfig(lr=1e-3, batch_size=64, micro_batch_tokens=8192),
    )


def _reward_model(folder: Path, stories: Stories, seed: int) -> tuple[Scores, float]:
    start = Lineage(source=BASE_SOURCE, base=stories.folder, adapters=())
    rng = torch.Generator().manual_seed(seed)
    pairs = _pairs(stories, load_policy(start, torch.float32), PAIRS + HELD_OUT)
    wrong = torch.rand(PAIRS, generator=rng) < WRONG
    learned = [_flipped(pair) if flip else pair for pair, flip in zip(pairs, wrong.tolist(), strict=False)]
    config = RewardConfig(
        adapter=FULL,
        optim=OptimConfig(lr=1e-3, batch_size=32, epochs=2, adam_eps=1e-5, micro_batch_tokens=8192),
        save_every=1000,
    )
    context = StageContext(spec=tiny_spec(folder, config, base_path=stories.folder, seed=seed), rank=0, world_size=1)
    trainer = reward._trainer(config, context, start, stories.tokenizer, as_table(learned))
    train(trainer, context, headline="loss")
    trainer.model.eval()

    def says(prompts: Sequence[Tokens], answers: Sequence[Tokens]) -> list[float]:
        return reward.scores(trainer, context, prompts, answers).tolist()

    held_out = pairs[PAIRS:]
    prompts = [pair.prompt for pair in held_out]
    better, worse = (
        says(prompts, [pair.chosen for pair in held_out]),
        says(prompts, [pair.rejected for pair in held_out]),
    )
    return says, _mean([float(chosen > rejected) for chosen, rejected in zip(better, worse, strict=True)])


def _pairs(stories: Stories, policy: PreTrainedModel, number: int) -> list[TokenizedPair]:
    prompts = stories.prompts()
    pairs: list[TokenizedPair] = []
    for turn in range(100):
        sides = [_answers(policy, stories, prompts, seed=1000 + 2 * turn + side) for side in (0, 1)]
        for prompt, *answers in zip(prompts, *sides, strict=True):
            chosen, rejected = sorted(answers, key=lambda answer: -gold_of(stories.text(answer)))
            if gold_of(stories.text(chosen)) > gold_of(stories.text(rejected)):
                pairs.append(TokenizedPair(prompt=prompt, chosen=chosen, rejected=rejected))
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


def _draw(seen: _Seen) -> None:
    draw(
        FIGURE,
        {
            "Score of the reward model (the proxy)": [
                seen.free.line("free", seen.free.proxy),
                seen.watched.line("guarded", seen.watched.proxy),
            ],
            "Gold": [seen.free.line("free", seen.free.gold), seen.watched.line("guarded", seen.watched.gold)],
        },
        below=f"√KL to the reference, nats a sequence; the guard handed on the policy of update {seen.best_updates}",
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
