"""PPO on models of width 32: what a step computes, how updates count, what changes, resumes, and the optimum."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from alignment.config.model import AdapterConfig, Critic, Dtype
from alignment.config.scoring import ScorerConfig
from alignment.core.errors import StageError
from alignment.models.assembly.roles import ValueHead
from alignment.models.forward.answers import answer_stream, unwrapped
from alignment.models.forward.generate import generate
from alignment.records.training import METRICS, MetricsLog
from alignment.records.worker import Progress
from alignment.rewards.scorers import Scores
from alignment.stages.ppo import engine
from alignment.stages.ppo.config import KlConfig, KlControl, OverlongConfig
from alignment.stages.ppo.experience import Experience
from alignment.stages.ppo.learn import Learner
from alignment.stages.ppo.trainer import PpoTrainer
from alignment.training.session import Preempted
from tests.oracles import gae as gae_oracle
from tests.oracles import length_penalties
from tests.oracles import masked as masked_oracle
from tests.oracles.close import close
from tests.proofs import bandit
from tests.proofs.common import MODES
from tests.unit.training.ppo_bench import (
    END,
    FULL,
    KINDS,
    LORA,
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
    values_of,
)

BETA, GAMMA, LAMBDA, CLIP, VALUE_CLIP = 0.3, 0.9, 0.8, 0.02, 0.01
COEFFICIENT, PENALTY, MAX_NORM, TEMPERATURE = 0.7, 0.75, 0.5, 0.8


def score(answer: Sequence[int]) -> float:
    return sum(answer) / 16 - 2.0


class Figures(NamedTuple):
    policy: float
    value: float
    kl: float
    norm: float
    gradients: Weights
    bound: dict[str, float]


def oracle(reference: Plain, old: Plain, new: Plain, rows: Rows, *, whiten: bool) -> Figures:
    with torch.no_grad():
        at_start, (before, old_values) = reference.says(rows, TEMPERATURE)[0], old.says(rows, TEMPERATURE)
    advantages, returns = targets(rows, before, at_start, old_values, whiten=whiten)
    logprobs, values = map(torch.cat, new.says(rows, TEMPERATURE))
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
        kl=float((torch.cat(before) - torch.cat(at_start)).sum()) / len(rows),
        norm=norm,
        gradients={name: p.grad * min(1.0, MAX_NORM / norm) for name, p in parts},
        bound={
            "policy": float((ratio * advantages > clipped * advantages).double().mean().detach()),
            "value": float(((near - returns) ** 2 > (values - returns) ** 2).double().mean()),
        },
    )


def targets(
    rows: Rows, before: list[Tensor], at_start: list[Tensor], values: list[Tensor], *, whiten: bool
) -> tuple[Tensor, Tensor]:
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
    return flat(masked_oracle.whitened(raw, mask), mask), flat(returns, mask)


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
        num_minibatches=1,
        temperature=TEMPERATURE,
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
    run.roles.actor_critic.value.score_offset.zero_()  # transformers' own model has no such constant
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
    assert abs(last.kl) > 0.01, "the policy should have moved"
    assert figures["objective/kl"] == pytest.approx(last.kl, rel=1e-3)
    for step, expected in ((2, first), (3, last)):
        assert trace.gradients[step].keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            assert float((trace.gradients[step][name] - gradient).norm() / gradient.norm()) < 1e-3, name


def test_answers_are_drawn_at_the_stages_temperature(bench: Callable[..., Bench]) -> None:
    run = bench(temperature=1e-4)
    rollout = run.trainer._collect(0)
    greedy = generate(
        unwrapped(run.roles.policy), rollout.prompts, max_new_tokens=6, end_ids=[END], batch_size=len(rollout.prompts)
    )
    assert rollout.answers == greedy
    warm = bench("warm", temperature=1.0)
    assert warm.trainer._collect(0).answers != greedy


class Relative(TokenRewards):
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


def test_length_is_subtracted_from_the_score_and_logged_by_itself(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    longest, per_token, overlong, missing = 24, 0.25, OverlongConfig(buffer=16, weight=3.0), 0.5
    collected = _collected(monkeypatch)
    run = bench(
        rewards=TokenRewards(lambda prompt, answer: float(sum(answer))),
        missing_eos_penalty=missing,
        length_penalty=per_token,
        overlong=overlong,
        max_new_tokens=longest,
    )
    run.train()
    every = sorted(len(answer) for experience in collected for answer in experience.answers)
    assert every[0] < longest - overlong.buffer < every[-1], "some answers should be short and some long"
    for experience, line in zip(collected, run.metrics(), strict=True):
        answers = experience.answers
        too_long = [
            -overlong.weight * length_penalties.overlong(len(answer), longest=longest, buffer=overlong.buffer)
            for answer in answers
        ]
        unended = sum(answer[-1] != END for answer in answers)
        mean_length, mean_sum = sum(map(len, answers)) / 8, sum(map(sum, answers)) / 8
        assert line["penalty/length"] == pytest.approx(per_token * mean_length, rel=1e-5)
        assert line["penalty/overlong"] == pytest.approx(sum(too_long) / 8, rel=1e-5)
        expected = mean_sum - per_token * mean_length - sum(too_long) / 8 - missing * unended / 8
        assert line["objective/score"] == pytest.approx(expected, rel=1e-5)
        assert line["score/rule"] == pytest.approx(mean_sum, rel=1e-5)
        assert 0.0 < line["penalty/overlong"] < overlong.weight, "the penalty should be between its ends"


def test_ppo_finds_the_optimum_of_one_token_answers(tmp_path: Path) -> None:
    task = bandit.make_bandit(tmp_path / "base", 0)
    assert task.best() - task.worth(task.reference) > bandit.POSSIBLE, "there should be something to gain"
    policy, _ = bandit.learned(tmp_path / "run", task, MODES[2], updates=20, seed=0)
    assert 0.97 < bandit.gain(task, policy) <= 1.0 + 1e-9


def _collected(monkeypatch: pytest.MonkeyPatch) -> list[Experience]:
    experiences: list[Experience] = []
    collect = PpoTrainer._collect

    def noted(self: PpoTrainer, update: int) -> Experience:
        experiences.append(collect(self, update))
        return experiences[-1]

    monkeypatch.setattr(PpoTrainer, "_collect", noted)
    return experiences


def test_a_wrong_reference_stops_before_anything_is_learned(bench: Callable[..., Bench]) -> None:
    run = bench()
    with torch.no_grad():
        run.roles.frozen_reference.model.norm.weight.mul_(1.5)
    before = sha256(trained(run.roles))
    with pytest.raises(StageError, match="so the reference is not the policy from which the stage started"):
        run.train()
    assert sha256(trained(run.roles)) == before


def test_an_update_learns_from_every_episode_once_an_epoch_and_the_rate_ends_at_zero(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten episodes of eight prompts, in minibatches that do not divide and micro-batches of unequal size."""
    seen: list[list[int]] = []
    rates: list[float] = []
    learn, step = Learner.learn, torch.optim.AdamW.step

    def noted(self: Learner, model: Any, experience: Experience, minibatch: int, **settings: Any) -> None:
        seen.append(experience.partition.rows_of(minibatch))
        learn(self, model, experience, minibatch, **settings)

    def counted(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Learner, "learn", noted)
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    rollouts = _collected(monkeypatch)
    run = bench(ppo_epochs=3, num_minibatches=4, optim=optim(batch_size=10, micro_batch_tokens=30))
    run.train()
    assert [len(rollout.answers) for rollout in rollouts] == [10, 10]
    assert [line["step"] for line in run.metrics()] == [1, 2]
    close(rates, [1e-3 * (1 - n / 24) for n in range(24)])  # the step after the last would have rate 0
    epochs = [[row for rows in seen[start : start + 4] for row in rows] for start in range(0, 24, 4)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 6
    for update in range(2):
        own = epochs[3 * update : 3 * update + 3]
        assert len({tuple(epoch) for epoch in own}) > 1, "epochs have an order of their own"
        minibatches = {tuple(sorted(rows)) for rows in seen[12 * update : 12 * update + 12]}
        assert len(minibatches) == 4, "in which the old log-probabilities were computed"
    assert {len(rows) for rows in seen} == {2, 3}


@KINDS
def test_a_shared_critic_learns_with_the_policy_in_one_pass(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, adapter: AdapterConfig
) -> None:
    run = bench(adapter=adapter, critic=Critic.shared, updates=1, ppo_epochs=1, num_minibatches=1)
    assert isinstance(run.roles.actor_critic.value, ValueHead)
    passes: list[int] = []
    unwrapped(run.roles.policy).model.norm.register_forward_hook(lambda *_: passes.append(1))
    run.roles.actor_critic.look(answer_stream([[5, 6]], [[7]], run.context.device), 1.0)
    assert passes == [1]
    assert not run.roles.actor_critic.value.weight.any()
    with torch.autocast(run.context.device.type, torch.bfloat16):
        assert run.roles.actor_critic.value(torch.ones(2, 32, device=run.context.device)).dtype == torch.float32
    run.train()
    assert run.roles.actor_critic.value.weight.any()
    (update,) = run.metrics()
    assert update["val/explained_variance"] == pytest.approx(0.0, abs=1e-6)


def test_with_a_prompt_baseline_rewards_are_relative_to_the_other_completions(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    collected = _collected(monkeypatch)
    run = bench(completions_per_prompt=4, prompt_baseline=True, temperature=3.0, updates=1)
    assert not values_of(run, PROMPTS[:2], [[3, 4], [5]]).any(), "the critic starts at 0"
    run.train()
    (experience,) = collected
    groups = [{tuple(prompt) for prompt in experience.prompts[start : start + 4]} for start in (0, 4)]
    assert [len(group) for group in groups] == [1, 1]
    assert groups[0] != groups[1]
    assert len({tuple(answer) for answer in experience.answers}) > 4
    first = experience.returns[:, 0]  # at γ = 1 all that is still to come; λ < 1 mixes in values, which are 0 here
    for group in range(2):
        rows = slice(4 * group, 4 * group + 4)
        scores = experience.scores[rows]
        for row, score in enumerate(scores.tolist()):
            others = (float(scores.sum()) - score) / 3
            length = int(experience.response_mask[rows][row].sum())
            expected = (score - others) * run.config.gae_lambda ** (length - 1)
            assert float(first[rows][row]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scorers": [ScorerConfig(weight=0.1)]},
        {"scorers": [ScorerConfig(normalize=True)]},
        {"scorers": [ScorerConfig(clip=5.0)]},
        {"scorers": [ScorerConfig(), ScorerConfig(source="bundled:quickstart/house_style.py:style")]},
        {"whiten_rewards": True},
        {"reward": False, "rewards": Relative()},
        {"reward": False, "rewards": Relative(), "adapter": LORA},
    ],
    ids=lambda changes: str(list(changes)),
)
def test_the_critic_starts_at_the_reward_models_scores_where_returns_are_these_and_else_at_zero(
    bench: Callable[..., Bench], changes: dict[str, Any]
) -> None:
    run = bench(**changes)
    prompts, answers = PROMPTS[:2], [[3, 4, END], [5]]
    values = values_of(run, prompts, answers)
    if changes:
        assert not any(values.tolist())
        return
    with torch.no_grad():  # before each token, what the reward model says of all tokens so far
        scores = [
            float(run.roles.reward(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
            for prompt, answer in zip(prompts, answers, strict=True)
            for ids in (torch.tensor([[*prompt, *answer[:length]]]) for length in range(len(answer)))
        ]
    close(values, scores, rtol=1e-4)


def test_the_critic_may_have_a_rate_of_its_own(bench: Callable[..., Bench]) -> None:
    run = bench(optim=optim(lr=1e-3, critic_lr=5e-3))
    optimizer = run.trainer.create_optimizer()
    policy, value = optimizer.param_groups
    assert (policy["lr"], value["lr"]) == (1e-3, 5e-3)
    assert {id(p) for p in policy["params"]} == {id(p) for p in run.roles.policy.parameters() if p.requires_grad}
    assert {id(p) for p in value["params"]} == {
        id(p) for p in run.roles.actor_critic.value.parameters() if p.requires_grad
    }
    assert {(group["eps"], group["weight_decay"]) for group in optimizer.param_groups} == {(1e-5, 0.0)}


def test_every_update_samples_with_numbers_of_its_own(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []
    generate = engine.generate

    def noted(*args: Any, **kwargs: Any) -> list[list[int]]:
        drawn.append(kwargs["sampling"].uniforms)
        return generate(*args, **kwargs)

    monkeypatch.setattr(engine, "generate", noted)
    bench(updates=3).train()
    numbers = torch.cat([uniforms.flatten() for uniforms in drawn])
    assert numbers.numel() == 3 * 8 * 6
    assert len(numbers.unique()) == numbers.numel()


@KINDS
def test_policy_and_critic_change_and_nothing_else_does(bench: Callable[..., Bench], adapter: AdapterConfig) -> None:
    run = bench(adapter=adapter)
    roles = run.roles
    frozen = {
        "reward": list(roles.reward.parameters()),
        "base of the policy": [p for p in roles.policy.parameters() if not p.requires_grad],
        "base of the value": [p for p in roles.actor_critic.value.parameters() if not p.requires_grad],
        "reference": [] if roles.frozen_reference is None else list(roles.frozen_reference.parameters()),
    }
    before = {name: sha256(parameters) for name, parameters in frozen.items()}
    learned = {name: p.detach().clone() for name, p in roles.actor_critic.named_parameters() if p.requires_grad}
    run.train()
    assert {name: sha256(parameters) for name, parameters in frozen.items()} == before
    now = dict(roles.actor_critic.named_parameters())
    changed = {name for name, parameter in learned.items() if not torch.equal(now[name], parameter)}
    # The key's bias and the like may rest; here there is none, so everything that is trained moves.
    assert changed == set(learned)
    assert {name.split(".")[0] for name in changed} == {"policy", "value"}


@pytest.mark.parametrize(("adapter", "critic"), [(LORA, Critic.separate), (FULL, Critic.shared)], ids=["lora", "full"])
def test_computing_activations_again_changes_no_weight(
    bench: Callable[..., Bench], adapter: AdapterConfig, critic: Critic
) -> None:
    """In learning each layer then runs twice, also the value model's; sampling and scoring are as before."""
    passes: dict[bool, int] = {}
    weights = {}
    for again in (False, True):
        run = bench(f"again-{again}", adapter=adapter, critic=critic, optim=optim(activation_checkpointing=again))
        counted: list[bool] = []
        for model in run.roles.trained_models():
            layer = model.base_model.layers[-1].mlp
            layer.register_forward_pre_hook(lambda *_, counted=counted: counted.append(torch.is_grad_enabled()))
        run.train()
        weights[again], passes[again] = sha256(trained(run.roles)), sum(counted)
    assert passes[True] == 2 * passes[False] > 0
    assert weights[True] == weights[False]


class _SignalAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": LORA, "kl": KlConfig(control=KlControl.adaptive, coefficient=0.2, target=0.01, horizon=20)},
        {"adapter": replace(FULL, master_weights=False), "dtype": Dtype.bfloat16},
    ],
    ids=["adaptive KL", "without masters"],
)
def test_a_resumed_run_equals_the_straight_one(bench: Callable[..., Bench], settings: dict[str, Any]) -> None:
    """Means of scores, the KL's coefficient, moments in bfloat16 and the random numbers of the rounding come back."""
    settings |= {"updates": 3, "save_every": 2, "missing_eos_penalty": 0.0}
    straight = bench("straight", rewards=Relative(), **settings)
    straight.train()
    assert {path.name for path in straight.context.checkpoints.iterdir()} == {"checkpoint-8", "checkpoint-12"}

    stopped = bench("resumed", rewards=Relative(), **settings)
    stopped.trainer.add_callback(_SignalAt(step=2))
    with pytest.raises(Preempted):
        stopped.train()
    names = [path.name for path in stopped.context.checkpoints.iterdir()]
    assert names == ["checkpoint-4"], "it stops where the update ends"
    progress = Progress.read(stopped.context.spec.work)
    assert progress is not None
    assert (progress.phase, progress.step, progress.total) == ("training", 1, 3)

    MetricsLog(stopped.context.content / METRICS).append(2, {"loss": 9.0})  # as a kill leaves one after the checkpoint
    resumed = bench("resumed", rewards=Relative(), **settings)
    resumed.train()
    assert sha256(trained(resumed.roles)) == sha256(trained(straight.roles))
    assert resumed.trainer.kl_controller == straight.trainer.kl_controller
    assert resumed.trainer.collector.rewards.state() == straight.trainer.collector.rewards.state()
    assert [line["step"] for line in resumed.metrics()] == [1, 2, 3]
    assert _untimed(resumed) == _untimed(straight)


def _untimed(run: Bench) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if not name.startswith("time/") and name != "seconds"}
        for line in run.metrics()
    ]


def test_the_adaptive_coefficient_follows_the_kl(bench: Callable[..., Bench]) -> None:
    kl = KlConfig(control=KlControl.adaptive, coefficient=0.2, target=1e-3, horizon=100)
    run = bench(updates=3, kl=kl)
    run.train()
    coefficients = [line["objective/kl_coef"] for line in run.metrics()] + [run.trainer.kl_controller.coefficient]
    for line, before, after in zip(run.metrics(), coefficients, coefficients[1:], strict=False):
        error = min(max(line["objective/kl"] / 1e-3 - 1.0, -0.2), 0.2)
        close(after, before * (1.0 + error * 8 / 100), rtol=1e-4)
