"""What the proofs share: claims with bounds, rewards that are functions of token ids, and PPO stages around them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment.config.model import AdapterConfig, AdapterKind, Critic, Dtype, ModelConfig
from alignment.models.assembly.load import Lineage
from alignment.models.assembly.roles import Roles
from alignment.models.forward.answers import unwrapped
from alignment.rewards.scorers import Rewards, Scores
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.ppo.engine import served_engine
from alignment.stages.ppo.experience import Prompts
from alignment.stages.ppo.guard import Guard
from alignment.stages.ppo.run import hold_out
from alignment.stages.ppo.trainer import PpoTrainer
from alignment.stages.ppo.trainer_setup import build_trainer, roles_of
from alignment.training.context import StageContext
from alignment.training.session import train
from tests.tiny import BASE_SOURCE, tiny_spec

SEEDS = (0, 1, 2)
Tokens = Sequence[int]
ScoreFunction = Callable[[Sequence[Tokens], Sequence[Tokens]], list[float]]
"""What answers to prompts are worth; both are token ids."""


class Skipped(Exception):
    """A proof cannot run here; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A figure, once for each seed, and the bounds that all of them must keep.

    Bounds of the closed forms were chosen before their first run; others were chosen with earlier runs known
    (docs/LOG.md), so they guard against getting worse and are no predictions.

    Example: ``Claim(figure="share of the possible gain", values=(0.996, 0.998), at_least=0.99)`` holds.
    """

    figure: str
    values: tuple[float, ...]
    at_least: float | None = None
    at_most: float | None = None

    @property
    def holds(self) -> bool:
        """Whether there are values and every one keeps the bounds; NaN keeps none."""
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return bool(self.values) and all(low <= value <= high for value in self.values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mode:
    """How policy and critic are trained."""

    name: str
    adapter: AdapterConfig
    critic: Critic


MODES = (
    Mode(name="full", adapter=AdapterConfig(kind=AdapterKind.full), critic=Critic.separate),
    Mode(name="LoRA", adapter=AdapterConfig(rank=8), critic=Critic.separate),
    Mode(name="LoRA, shared pass", adapter=AdapterConfig(rank=8), critic=Critic.shared),
)

IN_DTYPES = ((Dtype.float32, MODES), (Dtype.bfloat16, MODES[1:2]))
"""What learns from ratios is proven in both, in bfloat16 with the adapter that recipes have."""
ERROR = {Dtype.float32: 0.01, Dtype.bfloat16: 0.02}
"""Largest |π − π*|. bfloat16 rounds logits of 2 to 8 by up to .016, and p(1 − p)·.03 is at most .008 (chosen before the
first run)."""


def titled(name: str, dtype: Dtype) -> str:
    """The name of a figure, of float32 if it says nothing else."""
    return name if dtype is Dtype.float32 else f"{name}, {dtype.value}"


class TokenRewards:
    """Functions of token ids as what PPO scores answers with; the first is maximised, the others are only logged."""

    def __init__(self, **functions: ScoreFunction) -> None:
        self._functions = functions

    def scores(self, prompts: Sequence[Tokens], answers: Sequence[Tokens], rows: Sequence[int]) -> Scores:
        """One score an answer and function."""
        return Scores.of({name: torch.tensor(score(prompts, answers)) for name, score in self._functions.items()})

    def observe(self, scores: Scores) -> None:
        """Nothing: a function learns nothing."""

    def total(self, scores: Scores) -> Tensor:
        """The first function's scores as they are."""
        return scores.values[0]

    def of_ensembles(self, scores: Scores) -> dict[str, Tensor]:
        """Nothing: no function is an ensemble."""
        return {}

    def state(self) -> dict[str, Any]:
        """Nothing: a function learns nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing was kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PpoStage:
    """A PPO stage ready to be trained."""

    context: StageContext
    roles: Roles
    trainer: PpoTrainer
    resources: ExitStack

    def train(self) -> list[dict[str, Any]]:
        """Runs it to its end; returns what was logged, one entry an update. The guard then has its last word."""
        with self.resources:
            train(self.trainer, self.context, headline="objective/score", period=self.trainer.steps_per_update)
            if self.trainer.guard is not None:
                self.trainer.guard.finish(self.trainer.updates_done, self.trainer.rollouts)
        lines = (self.context.content / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def ppo_stage(
    folder: Path,
    config: PpoConfig,
    *,
    base: Path,
    prompts: Sequence[Sequence[int]],
    end_id: int,
    rewards: Rewards,
    seed: int,
    held_out_scorer: Rewards | None = None,
    dtype: Dtype = Dtype.float32,
) -> PpoStage:
    """The stage's own models and trainer on token ids, in ``folder``, starting from the model in ``base``.

    ``held_out_scorer`` is the guard's scorer, where the configuration has a guard.
    """
    model = ModelConfig(source=BASE_SOURCE, dtype=dtype)
    spec = tiny_spec(folder, config, base_path=base, seed=seed, model=model)
    context = StageContext(spec=spec, rank=0, world_size=1)
    start = Lineage(source=BASE_SOURCE, base=base, adapters=())
    roles = roles_of(config, context, start, None)
    ids = [list(prompt) for prompt in prompts]
    learned, held_out = hold_out(Prompts(ids=ids, rows=range(len(ids))), config, context)
    resources, ends = ExitStack(), frozenset({end_id})
    engine = resources.enter_context(served_engine(config, context, roles, start, learned, held_out, end_ids=ends))
    trainer = build_trainer(config, context, roles, learned, ends, rewards, engine=engine)
    if held_out_scorer is not None:
        trainer.guard = Guard(
            config.guard,
            context,
            held_out,
            scorer=held_out_scorer,
            policy=roles.policy,
            proxy=trainer.collector.scores_of,
        )
    return PpoStage(context=context, roles=roles, trainer=trainer, resources=resources)


@torch.no_grad()
def logprobs_after(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """``[rows, tokens, vocabulary]``: log p(next | prefix) at every place of rows of one length, float64 on the CPU."""
    base = unwrapped(model)
    return base(torch.tensor(rows, device=base.device)).logits.double().cpu().log_softmax(-1)


def each(score: Callable[[Tokens, Tokens], float]) -> ScoreFunction:
    """A function of one prompt and answer as one of many."""
    return lambda prompts, answers: [score(*pair) for pair in zip(prompts, answers, strict=True)]
