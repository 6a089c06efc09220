"""A PPO stage on a tiny model, the steps that it took, and an oracle's models that take them again in float64."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.config.model import AdapterConfig, AdapterKind, Dtype, ModelConfig
from alignment.models.assembly.load import Lineage
from alignment.models.assembly.roles import Roles
from alignment.models.forward.answers import batches, scalar_scores
from alignment.rewards.scorers import Rewards, Scores
from alignment.stages.ppo.config import PpoConfig, PpoOptimConfig
from alignment.stages.ppo.experience import Prompts
from alignment.stages.ppo.trainer import PpoTrainer
from alignment.stages.ppo.trainer_setup import build_trainer, roles_of
from alignment.training.context import StageContext
from alignment.training.session import train
from tests.proofs import common
from tests.tiny import BASE_SOURCE, tiny_model, tiny_reward, tiny_scorer, tiny_spec, tiny_tokenizer

LORA = AdapterConfig(rank=4)
FULL = AdapterConfig(kind=AdapterKind.full)
KINDS = pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
END = 2
PROMPTS = [[5, 9, 2, 7], [8], [3, 2, 6, 4, 9, 2, 11], [4, 10], [17, 18, 19], [1, 12, 2], [13], [14, 15, 16, 20]]


@dataclass(kw_only=True)
class Bench:
    context: StageContext
    config: PpoConfig
    roles: Roles
    trainer: PpoTrainer

    def train(self) -> dict[str, float]:
        return train(self.trainer, self.context, headline="objective/score", period=self.trainer.steps_per_update)

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.context.content / name).read_text().splitlines()]

    def metrics(self) -> list[dict[str, Any]]:
        return self.lines("metrics.jsonl")


class TokenRewards(common.TokenRewards):
    def __init__(self, score: Callable[[Sequence[int], Sequence[int]], float], name: str = "rule") -> None:
        super().__init__(**{name: common.each(score)})
        self._name = name

    def named(self, scores: Sequence[float]) -> Scores:
        return Scores.of({self._name: torch.tensor(scores)})


class OwnReward(TokenRewards):
    def __init__(self, roles: Roles) -> None:
        super().__init__(lambda prompt, answer: 0.0, name="reward")
        self._model = roles.reward

    def scores(self, prompts: Any, answers: Any, rows: Any) -> Scores:
        parts = batches(prompts, answers, tokens=1000, device=next(self._model.parameters()).device)
        return self.named(torch.cat([scalar_scores(self._model, part.rows) for part in parts]).tolist())


def bench_in(folder: Path) -> Callable[..., Bench]:
    base = folder / "base"
    tiny_model(vocab_size=24).save_pretrained(str(base))
    tiny_tokenizer().save_pretrained(str(base))  # asked for its hashes only
    lineage = Lineage(source=BASE_SOURCE, base=base, adapters=())
    made = {}

    def make(
        name: str = "run",
        *,
        adapter: AdapterConfig = FULL,
        prompts: Any = PROMPTS,
        reward: bool = True,
        rewards: Rewards | None = None,
        dtype: Dtype = Dtype.float32,
        seed: int = 0,
        **changes: Any,
    ) -> Bench:
        if adapter.kind not in made:
            made[adapter.kind] = tiny_reward(folder / f"reward-{adapter.kind.value}", adapter, start=lineage)
        settings = {"updates": 2, "ppo_epochs": 2, "num_minibatches": 2, "max_new_tokens": 6, "optim": optim()}
        config = PpoConfig(adapter=adapter, **{**settings, **changes})
        model = ModelConfig(source=BASE_SOURCE, dtype=dtype)
        spec = tiny_spec(folder / name, config, base_path=base, model=model, seed=seed)
        context = StageContext(spec=spec, rank=0, world_size=1)
        torch.manual_seed(context.seed("worker") % 2**32)  # as the worker does: a fresh adapter is drawn from it
        roles = roles_of(config, context, lineage, made[adapter.kind] if reward else None)
        stage_prompts = Prompts(ids=prompts, rows=range(40, 40 + len(prompts)))
        trainer = build_trainer(config, context, roles, stage_prompts, frozenset({END}), rewards or OwnReward(roles))
        return Bench(context=context, config=config, roles=roles, trainer=trainer)

    return make


def optim(**changes: Any) -> PpoOptimConfig:
    return replace(PpoOptimConfig(lr=1e-3, batch_size=8, micro_batch_tokens=1000), **changes)


def values_of(run: Bench, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        (stream,) = batches(prompts, answers, tokens=1000, device=run.trainer.args.device)
        _, values = run.roles.actor_critic.look(stream, 1.0)
    assert values is not None
    return values


def sha256(parameters: Any) -> str:
    sha = hashlib.sha256()
    for parameter in parameters:
        sha.update(parameter.detach().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return sha.hexdigest()


def trained(roles: Roles) -> list[torch.Tensor]:
    return [parameter for parameter in roles.actor_critic.parameters() if parameter.requires_grad]


Weights = dict[str, Tensor]
Rows = list[tuple[list[int], list[int]]]


@dataclass
class Taken:
    before: list[Weights]
    gradients: list[Weights]
    rows: list[Rows]


def taken(run: Bench, monkeypatch: pytest.MonkeyPatch) -> Taken:
    trace = Taken(before=[], gradients=[], rows=[])
    step, collect = torch.optim.AdamW.step, PpoTrainer._collect
    named = dict(run.roles.actor_critic.named_parameters())

    def noted_step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        trace.before.append({name: p.detach().double() for name, p in named.items()})
        trace.gradients.append({name: p.grad.double() for name, p in named.items() if p.grad is not None})
        return step(self, *args, **kwargs)

    def noted_collect(self: PpoTrainer, update: int) -> Any:
        experience = collect(self, update)
        pairs = zip(experience.prompts, experience.answers, strict=True)
        trace.rows.append([(list(prompt), list(answer)) for prompt, answer in pairs])
        return experience

    monkeypatch.setattr(torch.optim.AdamW, "step", noted_step)
    monkeypatch.setattr(PpoTrainer, "_collect", noted_collect)
    run.train()
    return trace


class Plain:
    def __init__(self, weights: Weights) -> None:
        self.policy = tiny_model(vocab_size=24).double()
        self.value = tiny_scorer(vocab_size=24).double()
        for part, model in (("policy.", self.policy), ("value.", self.value)):
            own = {name.removeprefix(part): held for name, held in weights.items() if name.startswith(part)}
            model.load_state_dict(own, strict=False)
            assert not own or {name for name, _ in model.named_parameters()} <= own.keys()

    def distributions(self, rows: Rows, temperature: float = 1.0) -> list[Tensor]:
        distributions = []
        for prompt, answer in rows:
            logits = self.policy(torch.tensor([prompt + answer])).logits[0]
            distributions.append((logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1))
            assert len(distributions[-1]) == len(answer)
        return distributions

    def logprobs(self, rows: Rows, temperature: float = 1.0) -> list[Tensor]:
        pairs = zip(rows, self.distributions(rows, temperature), strict=True)
        return [each.gather(-1, torch.tensor(answer)[:, None])[:, 0] for (_, answer), each in pairs]

    def values(self, rows: Rows) -> list[Tensor]:
        values = []
        for prompt, answer in rows:
            at = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
            states = self.value.model(torch.tensor([prompt + answer])).last_hidden_state[0, at]
            values.append((states @ self.value.score.weight.T)[:, 0])
        return values

    def says(self, rows: Rows, temperature: float) -> tuple[list[Tensor], list[Tensor]]:
        return self.logprobs(rows, temperature), self.values(rows)
