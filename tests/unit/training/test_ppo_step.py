"""An update of PPO: its steps, what it logs of prompts, answers, KL and length, and the optimum that it finds."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from alignment.config.model import Dtype
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.generate import generate
from alignment.rewards.scores import Scores
from alignment.stages.ppo.config import KlConfig, OverlongConfig
from alignment.stages.ppo.experience import Partition, Rollout
from alignment.stages.ppo.rollouts import Rollouts
from alignment.training.session import Preempted
from tests.oracles import gae as gae_oracle
from tests.oracles import length_penalties
from tests.oracles import logprobs as slow_logprobs
from tests.oracles import masked as masked_oracle
from tests.oracles.close import close
from tests.proofs import bandit, count
from tests.proofs.common import MODES
from tests.unit.training.ppo_bench import (
    END,
    PROMPTS,
    Bench,
    Plain,
    Rows,
    TokenRewards,
    Weights,
    optim,
    sha256,
    taken,
    trained,
)

BETA, GAMMA, LAMBDA, CLIP, VALUE_CLIP, COEFFICIENT, PENALTY, MAX_NORM = 0.3, 0.9, 0.8, 0.02, 0.01, 0.7, 0.75, 0.5


def score(answer: Sequence[int]) -> float:
    return sum(answer) / 16 - 2.0


@dataclass
class Figures:
    """The losses of a step, each summed over tokens and divided by their number, and the gradients of both."""

    policy: float
    value: float
    norm: float
    gradients: Weights
    bound: dict[str, float]


def oracle(reference: Plain, old: Plain, new: Plain, rows: Rows, **how: Any) -> Figures:
    with torch.no_grad():
        at_start, (before, old_values) = reference.says(rows)[0], old.says(rows)
    advantages, returns = targets(rows, before, at_start, old_values, **how)
    logprobs, values = map(torch.cat, new.says(rows))
    ratio = (logprobs - torch.cat(before)).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    policy = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    near = torch.minimum(torch.maximum(values, torch.cat(old_values) - VALUE_CLIP), torch.cat(old_values) + VALUE_CLIP)
    value = 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean()
    (policy + COEFFICIENT * value).backward()
    parts = [("policy." + name, p) for name, p in new.policy.named_parameters()]
    parts += [("value." + name, p) for name, p in new.value.named_parameters()]
    norm = float(torch.cat([p.grad.flatten() for _, p in parts]).norm())
    return Figures(
        policy=float(policy.detach()),
        value=float(value.detach()),
        norm=norm,
        gradients={name: p.grad * min(1.0, MAX_NORM / norm) for name, p in parts},
        bound={
            "policy": float((ratio * advantages > clipped * advantages).double().mean().detach()),
            "value": float(((near - returns) ** 2 > (values - returns) ** 2).double().mean()),
        },
    )


def targets(
    rows: Rows,
    before: list[Tensor],
    at_start: list[Tensor],
    values: list[Tensor],
    *,
    whiten: bool,
) -> tuple[Tensor, Tensor]:
    """Whitened advantages and returns of all tokens, one answer after another."""
    lengths = [len(answer) for _, answer in rows]
    mask = [[position < length for position in range(max(lengths))] for length in lengths]
    scores = [score(answer) - (0.0 if answer[-1] == END else PENALTY) for _, answer in rows]
    costs = padded([now - start for now, start in zip(before, at_start, strict=True)])
    rewards = gae_oracle.token_rewards(scores, costs, lengths, kl_coefficient=BETA)
    if whiten:
        rewards = masked_oracle.scaled(rewards, mask)
    gae_inputs = (rewards, padded(values), lengths)
    raw = gae_oracle.advantages(*gae_inputs, gamma=GAMMA, gae_lambda=LAMBDA)
    returns = gae_oracle.returns(*gae_inputs, gamma=GAMMA, gae_lambda=LAMBDA)
    whitened = masked_oracle.whitened(raw, mask)
    return flat(whitened, mask), flat(returns, mask)


def padded(rows: list[Tensor]) -> list[list[float]]:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).tolist()


def flat(rows: list[list[float]], mask: list[list[bool]]) -> Tensor:
    return torch.tensor(masked_oracle.counted(rows, mask), dtype=torch.float64)


@pytest.mark.parametrize("whiten", [True, False], ids=["whitened rewards", "plain rewards"])
def test_a_step_is_what_the_papers_say(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, whiten: bool
) -> None:
    """The second epoch of the second update: policy, old policy and reference are three, and every clip binds."""
    run = bench(
        updates=2,
        ppo_epochs=2,
        num_minibatches=1,
        prompts=PROMPTS,
        rewards=TokenRewards(lambda prompt, answer: score(answer)),
        kl=KlConfig(coefficient=BETA),
        gamma=GAMMA,
        gae_lambda=LAMBDA,
        clip=CLIP,
        value_clip=VALUE_CLIP,
        value_coefficient=COEFFICIENT,
        whiten_rewards=whiten,
        missing_eos_penalty=PENALTY,
        optim=optim(lr=3e-3, batch_size=16, micro_batch_tokens=40, max_grad_norm=MAX_NORM),
    )
    offset = run.roles.actor_critic.value.score_offset
    offset.zero_()  # a constant beside every value, which transformers' own model does not have
    trace = taken(run, monkeypatch)
    plain = [Plain(weights) for weights in trace.before]
    first, last = (
        oracle(plain[0], Plain(trace.before[2]), plain[step], trace.rows[1], whiten=whiten) for step in (2, 3)
    )
    assert all(0.05 < share < 0.95 for share in last.bound.values()), f"clips should bind somewhere: {last.bound}"
    assert last.norm > 1.2 * MAX_NORM, "the gradient should be clipped"
    assert {answer[-1] == END for _, answer in trace.rows[1]} == {True, False}
    figures = run.metrics()[1]
    assert figures["loss/policy"] == pytest.approx((first.policy + last.policy) / 2, rel=1e-3, abs=1e-5)
    assert figures["loss/value"] == pytest.approx((first.value + last.value) / 2, rel=1e-3)
    assert figures["grad_norm"] == pytest.approx(last.norm, rel=1e-3)
    for step, expected in ((2, first), (3, last)):
        assert trace.gradients[step].keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            error = (trace.gradients[step][name] - gradient).norm() / gradient.norm()
            assert float(error) < 1e-3, name


def _logprobs(model: Any, prompt: list[int], answer: list[int], temperature: float) -> list[float]:
    """Of each token of the answer, by one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0].tolist()
    return [
        slow_logprobs.log_softmax(logits[len(prompt) - 1 + position], temperature=temperature)[token]
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


LONGEST, PER_TOKEN, OVERLONG, MISSING = 24, 0.25, OverlongConfig(buffer=16, weight=3.0), 0.5


def _rollouts(monkeypatch: pytest.MonkeyPatch) -> list[Rollout]:
    made: list[Rollout] = []
    of_update = Rollouts.of_update

    def noted(self: Rollouts, *args: Any) -> tuple[Rollout, Partition]:
        rollout, cut = of_update(self, *args)
        made.append(rollout)
        return rollout, cut

    monkeypatch.setattr(Rollouts, "of_update", noted)
    return made


def test_length_is_subtracted_from_the_score_and_logged_by_itself(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _rollouts(monkeypatch)
    run = bench(
        updates=2,
        rewards=TokenRewards(lambda prompt, answer: float(sum(answer))),
        missing_eos_penalty=MISSING,
        length_penalty=PER_TOKEN,
        overlong=OVERLONG,
        max_new_tokens=LONGEST,
    )
    run.train()
    every = sorted(len(answer) for rollout in made for answer in rollout.answers)
    assert every[0] < LONGEST - OVERLONG.buffer < every[-1], "some answers should be short and some long"
    for rollout, line in zip(made, run.metrics(), strict=True):
        lengths = [len(answer) for answer in rollout.answers]
        overlong = [
            -OVERLONG.weight * length_penalties.overlong(length, longest=LONGEST, buffer=OVERLONG.buffer)
            for length in lengths
        ]
        per_token = [PER_TOKEN * length for length in lengths]
        missing = [0.0 if answer[-1] == END else MISSING for answer in rollout.answers]
        scores = [
            float(sum(answer)) - a - b - c
            for answer, a, b, c in zip(rollout.answers, overlong, per_token, missing, strict=True)
        ]
        count = len(lengths)
        assert line["penalty/length"] == pytest.approx(sum(per_token) / count, rel=1e-5)
        assert line["penalty/overlong"] == pytest.approx(sum(overlong) / count, rel=1e-5)
        assert line["objective/score"] == pytest.approx(sum(scores) / count, rel=1e-5)
        assert line["score/rule"] == pytest.approx(sum(sum(a) for a in rollout.answers) / count, rel=1e-5)
        assert 0.0 < line["penalty/overlong"] < OVERLONG.weight, "the penalty should be between its ends"


def test_without_penalties_there_are_no_columns_and_the_same_scores(bench: Callable[..., Bench]) -> None:
    plain, off = bench("plain", updates=1), bench("off", updates=1, overlong=OverlongConfig(weight=9.0))
    plain.train()
    off.train()
    assert not any(name.startswith("penalty/") for name in plain.metrics()[0])
    assert plain.metrics()[0]["objective/score"] == off.metrics()[0]["objective/score"]


WHOLE, _, SHARED = MODES


def test_ppo_finds_the_optimum_of_one_token_answers(tmp_path: Path) -> None:
    task = bandit.make_bandit(tmp_path / "base", 0)
    assert task.best() - task.worth(task.reference) > bandit.POSSIBLE, "there should be something to gain"
    policy, _ = bandit.learned(tmp_path / "run", task, SHARED, updates=40, seed=0)
    assert 0.97 < bandit.gain(task, policy) <= 1.0 + 1e-9


def test_ppo_finds_out_which_of_five_tokens_earned_the_score(tmp_path: Path) -> None:
    policy, _ = count.learned(tmp_path, WHOLE, updates=40, seed=0)
    judgement = count.judged(policy)
    assert 0.97 < judgement.gain <= 1.0 + 1e-9
    assert judgement.outside < count.OUTSIDE[Dtype.float32]
