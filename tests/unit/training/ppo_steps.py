"""Steps that a PPO stage took, and the models of an oracle that takes them again in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.stages.ppo.trainer import PpoTrainer
from tests.tiny import tiny_model, tiny_scorer
from tests.unit.training.ppo_bench import Bench

Weights = dict[str, Tensor]
Rows = list[tuple[list[int], list[int]]]


@dataclass
class Taken:
    """What a run left: weights before each step and gradients that its optimiser was given, and each update's rows."""

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
    """Policy and value model in float64 by transformers alone; both of them learn. Weights may be of a policy alone."""

    def __init__(self, weights: Weights) -> None:
        self.policy = tiny_model(vocab_size=24).double()
        self.value = tiny_scorer(vocab_size=24).double()
        for part, model in (("policy.", self.policy), ("value.", self.value)):
            own = {name.removeprefix(part): held for name, held in weights.items() if name.startswith(part)}
            model.load_state_dict(own, strict=False)
            assert not own or {name for name, _ in model.named_parameters()} <= own.keys()

    def distributions(self, rows: Rows, temperature: float = 1.0) -> list[Tensor]:
        """``[answer tokens, vocabulary]`` log-probabilities before each token of an answer."""
        distributions = []
        for prompt, answer in rows:
            logits = self.policy(torch.tensor([prompt + answer])).logits[0]
            distributions.append((logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1))
            assert len(distributions[-1]) == len(answer)
        return distributions

    def logprobs(self, rows: Rows, temperature: float = 1.0) -> list[Tensor]:
        """Log-probabilities of answer tokens."""
        pairs = zip(rows, self.distributions(rows, temperature), strict=True)
        return [each.gather(-1, torch.tensor(answer)[:, None])[:, 0] for (_, answer), each in pairs]

    def values(self, rows: Rows) -> list[Tensor]:
        """Values before answer tokens."""
        values = []
        for prompt, answer in rows:
            at = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
            states = self.value.model(torch.tensor([prompt + answer])).last_hidden_state[0, at]
            values.append((states @ self.value.score.weight.T)[:, 0])
        return values

    def says(self, rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
        """Log-probabilities of answer tokens, and values before them."""
        return self.logprobs(rows), self.values(rows)
