"""What a PPO stage draws, logs and remembers, by value and beside plain forward passes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from alignment.models.forward.answers import unwrapped
from alignment.models.forward.generate import generate
from alignment.rewards.scores import Scores
from alignment.training.rl.experience import Partition, Rollout
from alignment.training.rl.rollouts import Rollouts
from alignment.training.session import Preempted
from tests.oracles import logprobs as oracle
from tests.oracles.close import close
from tests.unit.training.ppo_bench import END, PROMPTS, Bench, TokenRewards, optim, sha256, trained


def _logprobs(model: Any, prompt: list[int], answer: list[int], temperature: float) -> list[float]:
    """Of each token of the answer, by one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0].tolist()
    return [
        oracle.log_softmax(logits[len(prompt) - 1 + position], temperature=temperature)[token]
        for position, token in enumerate(answer)
    ]


def test_the_kl_is_that_of_the_sampled_answers_by_value(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A positive column says that the policy likes its answers better than the reference does."""
    run = bench(updates=2, temperature=0.7, optim=optim(lr=1e-2))
    expected: list[float] = []
    of_update = Rollouts.of_update

    def noted(self: Rollouts, *args: Any) -> tuple[Rollout, Partition]:
        rollout, cut = of_update(self, *args)
        total = 0.0
        for prompt, answer in zip(rollout.prompts, rollout.answers, strict=True):
            policy = _logprobs(unwrapped(run.roles.policy), prompt, answer, 0.7)
            total += sum(policy) - sum(_logprobs(run.roles.frozen_reference, prompt, answer, 0.7))
        expected.append(total / len(rollout.answers))
        return rollout, cut

    monkeypatch.setattr(Rollouts, "of_update", noted)
    run.train()
    assert abs(expected[1]) > 0.01, "the policy has moved"
    close([line["objective/kl"] for line in run.metrics()], expected, rtol=1e-4, atol=1e-4)


def test_updates_go_on_with_the_prompts_that_come_next(bench: Callable[..., Bench]) -> None:
    run = bench(optim=optim(batch_size=4))
    drawn = [run.trainer._collect(update).prompts for update in range(2)]
    assert sorted(drawn[0] + drawn[1]) == sorted(PROMPTS)


def test_answers_are_drawn_at_the_stages_temperature(bench: Callable[..., Bench]) -> None:
    """Near zero they are the likeliest ones."""
    run = bench(temperature=1e-4)
    rollout = run.trainer._collect(0)
    greedy = generate(
        unwrapped(run.roles.policy), rollout.prompts, max_new_tokens=6, end_ids=[END], batch_size=len(rollout.prompts)
    )
    assert rollout.answers == greedy
    warm = bench("warm", temperature=1.0)
    assert warm.trainer._collect(0).answers != greedy


def test_checkpoints_lie_where_updates_end(bench: Callable[..., Bench]) -> None:
    """Inside an update, one would lack the answers that are being learned from."""
    run = bench(updates=3, save_every=2)
    run.train()
    assert run.trainer.steps_per_update == 4
    assert {path.name for path in run.context.checkpoints.iterdir()} == {"checkpoint-8", "checkpoint-12"}


class _Relative(TokenRewards):
    """The length of an answer less the mean length so far."""

    def __init__(self) -> None:
        super().__init__(lambda prompt, answer: float(len(answer)))
        self._sum, self._count = 0.0, 0

    def observe(self, scores: Scores) -> None:
        self._sum, self._count = self._sum + float(scores.values.sum()), self._count + scores.values.numel()

    def total(self, scores: Scores) -> torch.Tensor:
        return scores.values[0] - self._sum / self._count

    def state(self) -> dict[str, Any]:
        return {"sum": self._sum, "count": self._count}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._sum, self._count = state["sum"], state["count"]


class _StopAt(TrainerCallback):
    """Asks this process to stop during a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_running_means_of_scores_go_on_over_a_resume(bench: Callable[..., Bench]) -> None:
    settings: dict[str, Any] = {"updates": 2, "missing_eos_penalty": 0.0}
    straight = bench("straight", rewards=_Relative(), **settings)
    straight.train()
    stopped = bench("resumed", rewards=_Relative(), **settings)
    stopped.trainer.add_callback(_StopAt())
    with pytest.raises(Preempted):
        stopped.train()
    resumed = bench("resumed", rewards=_Relative(), **settings)
    resumed.train()
    assert resumed.trainer.collector.rewards.state() == straight.trainer.collector.rewards.state()
    assert sha256(trained(resumed.roles)) == sha256(trained(straight.roles))
