"""PPO on models of width 32, float32: how it counts, what it changes, that it resumes and finds the optimum."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from alignment.config.model import AdapterConfig, Critic, Dtype
from alignment.config.scoring import ScorerConfig
from alignment.core.errors import ConfigError, StageError
from alignment.models.assembly.roles import ValueHead
from alignment.models.forward.answers import answer_stream, unwrapped
from alignment.records.worker import Progress
from alignment.stages.ppo import engine, objective
from alignment.stages.ppo.config import KlConfig, KlControl
from alignment.stages.ppo.experience import Experience, Partition, Rollout
from alignment.stages.ppo.learn import Learner
from alignment.stages.ppo.rollouts import Rollouts
from alignment.stages.ppo.trainer import PpoTrainer
from alignment.training.session import Preempted
from tests.oracles import gae as gae_oracle
from tests.oracles import masked as masked_oracle
from tests.oracles.close import close
from tests.unit.training.ppo_bench import (
    END,
    FULL,
    KINDS,
    LORA,
    PROMPTS,
    Bench,
    TokenRewards,
    optim,
    sha256,
    trained,
    values_of,
)


def _collected(monkeypatch: pytest.MonkeyPatch) -> list[Experience]:
    """Every rollout batch that is made from now on."""
    experiences: list[Experience] = []
    collect = PpoTrainer._collect

    def noted(self: PpoTrainer, update: int) -> Experience:
        experiences.append(collect(self, update))
        return experiences[-1]

    monkeypatch.setattr(PpoTrainer, "_collect", noted)
    return experiences


# ---- the first step -------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_nothing_has_changed_at_the_first_minibatch(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, adapter: AdapterConfig, temperature: float
) -> None:
    """The ratio is one and the KL zero: rollout, training and reference agree on log-probabilities."""
    changes: list[torch.Tensor] = []
    log_ratio = objective.log_ratio

    def noted(*args: torch.Tensor) -> torch.Tensor:
        changes.append(log_ratio(*args).detach())
        return log_ratio(*args)

    monkeypatch.setattr(objective, "log_ratio", noted)
    run = bench(adapter=adapter, updates=1, num_minibatches=1, temperature=temperature)
    run.train()
    assert float(changes[0].abs().max()) < 1e-5
    assert float(changes[1].abs().max()) > 1e-4, "the second epoch should see a change"
    (first,) = run.metrics()
    assert first["policy/approxkl_first"] < 1e-10
    assert abs(first["objective/kl"]) < 1e-4
    assert first["objective/kl_k3"] < 1e-8


def test_a_wrong_reference_stops_before_anything_is_learned(bench: Callable[..., Bench]) -> None:
    run = bench()
    with torch.no_grad():
        run.roles.frozen_reference.model.norm.weight.mul_(1.5)
    before = sha256(trained(run.roles))
    with pytest.raises(StageError, match="so the reference is not the policy from which the stage started"):
        run.train()
    assert sha256(trained(run.roles)) == before


# ---- counting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "batch", "micro", "epochs", "minibatches", "updates"),
    [
        pytest.param(8, 8, 1000, 2, 2, 3, id="the prompts are one rollout batch"),
        pytest.param(8, 8, 25, 4, 1, 3, id="with micro-batches"),
        pytest.param(3, 8, 40, 1, 4, 2, id="fewer prompts than a rollout batch"),
        pytest.param(8, 4, 30, 3, 1, 3, id="micro-batches of unequal size"),
        pytest.param(8, 6, 1000, 1, 4, 2, id="minibatches that do not divide"),
    ],
)
def test_an_update_takes_exactly_epochs_times_minibatches_steps(
    bench: Callable[..., Bench],
    monkeypatch: pytest.MonkeyPatch,
    prompts: int,
    batch: int,
    micro: int,
    epochs: int,
    minibatches: int,
    updates: int,
) -> None:
    steps = []
    step = torch.optim.AdamW.step

    def counted(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        steps.append([group["lr"] for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    rollouts = _collected(monkeypatch)
    run = bench(
        prompts=PROMPTS[:prompts],
        updates=updates,
        ppo_epochs=epochs,
        num_minibatches=minibatches,
        optim=optim(batch_size=batch, micro_batch_tokens=micro),
    )
    run.train()
    total = updates * epochs * minibatches
    assert len(steps) == total
    assert [len(rollout.answers) for rollout in rollouts] == [batch] * updates
    assert [line["step"] for line in run.metrics()] == list(range(1, updates + 1))
    # Annealed linearly to zero: the step after the last would have rate 0.
    close([rates[0] for rates in steps], [1e-3 * (1 - n / total) for n in range(total)])


def test_every_episode_is_learned_from_once_an_epoch(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    learn = Learner.learn

    def noted(self: Learner, model: Any, experience: Experience, minibatch: int, **step: Any) -> None:
        seen.append(experience.partition.rows_of(minibatch))
        learn(self, model, experience, minibatch, **step)

    monkeypatch.setattr(Learner, "learn", noted)
    bench(updates=2, ppo_epochs=3, num_minibatches=4, optim=optim(batch_size=10)).train()
    epochs = [[row for rows in seen[start : start + 4] for row in rows] for start in range(0, len(seen), 4)]
    assert len(epochs) == 6
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 6
    for update in range(2):
        own = epochs[3 * update : 3 * update + 3]
        assert len({tuple(epoch) for epoch in own}) > 1, "epochs have an order of their own"
        minibatches = {tuple(sorted(rows)) for rows in seen[12 * update : 12 * update + 12]}
        assert len(minibatches) == 4, "in which the old log-probabilities were computed"
    assert {len(rows) for rows in seen} == {2, 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_minibatches": 9}, "9 minibatches of 8 prompts leave 0 for 1 processes"),
        ({"completions_per_prompt": 3}, "8 episodes cannot be divided into groups of 3 completions"),
        ({"prompt_baseline": True}, "the other completions of a prompt, but there are none"),
    ],
)
def test_counts_that_do_not_divide_are_refused(
    bench: Callable[..., Bench], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(**changes)


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
        {"scorers": [ScorerConfig(source="length", target=5)]},
        {"whiten_rewards": True},
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


def test_several_answers_to_a_prompt_are_sampled_and_learned_from_together(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    collected = _collected(monkeypatch)
    run = bench(completions_per_prompt=4, temperature=3.0)
    run.train()
    assert len(collected) == 2
    for experience in collected:
        groups = [experience.prompts[start : start + 4] for start in (0, 4)]
        assert all(len({tuple(prompt) for prompt in group}) == 1 for group in groups)
        assert groups[0] != groups[1]
        assert len({tuple(answer) for answer in experience.answers}) > 4
    assert len(run.metrics()) == 2


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


# ---- what an update learns from -------------------------------------------------------------------------------------


def test_an_experience_is_what_the_papers_say_of_its_own_figures(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = _collected(monkeypatch)
    run = bench(updates=2, gae_lambda=0.9, gamma=0.98, kl=KlConfig(coefficient=0.3))
    references = []
    rollout = Rollouts.of_update

    def noted(self: Rollouts, *args: Any) -> tuple[Rollout, Partition]:
        batch, cut = rollout(self, *args)
        references.append(torch.nn.utils.rnn.pad_sequence(batch.readings.reference_logprobs, batch_first=True))
        return batch, cut

    monkeypatch.setattr(Rollouts, "of_update", noted)
    run.train()
    for experience, reference in zip(rollouts, references, strict=True):
        lengths = [len(answer) for answer in experience.answers]
        costs = (experience.logprobs.cpu() - reference.cpu()).tolist()
        rewards = gae_oracle.token_rewards(experience.scores.tolist(), costs, lengths, kl_coefficient=0.3)
        gae_inputs = (rewards, experience.values.tolist(), lengths)
        advantages = gae_oracle.advantages(*gae_inputs, gamma=0.98, gae_lambda=0.9)
        mask = experience.response_mask.tolist()
        assert mask == [[position < length for position in range(max(lengths))] for length in lengths]
        close(experience.returns, gae_oracle.returns(*gae_inputs, gamma=0.98, gae_lambda=0.9), rtol=1e-4, atol=1e-5)
        close(experience.advantages, masked_oracle.whitened(advantages, mask), rtol=1e-4, atol=1e-4)
    moved = rollouts[1].logprobs.cpu() - references[1].cpu()
    assert float(moved.abs().max()) > 1e-4, "the second update should see a KL"


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


@pytest.mark.parametrize("level", [-40.0, 0.0, 40.0])
def test_an_answer_that_never_ended_scores_less_than_it_would_have(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, level: float
) -> None:
    """By the penalty, wherever the scores lie: not ending is never worth anything."""
    rollouts = _collected(monkeypatch)
    rewards = TokenRewards(lambda prompt, answer: level + sum(answer) / 8)
    run = bench(updates=2, rewards=rewards, missing_eos_penalty=3.25, optim=optim(batch_size=32))
    run.train()
    answers = [answer for rollout in rollouts for answer in rollout.answers]
    scores = torch.cat([rollout.scores for rollout in rollouts]).tolist()
    ended = [answer[-1] == END for answer in answers]
    assert 0 < sum(ended) < len(ended)
    for has_ended, answer, reward in zip(ended, answers, scores, strict=True):
        assert reward == level + sum(answer) / 8 - (0.0 if has_ended else 3.25)
        assert END not in answer[:-1]
        assert len(answer) == 6 or has_ended
    close(run.metrics()[0]["eos_rate"], sum(ended[:32]) / 32)
    close(run.metrics()[0]["response_length"], sum(map(len, answers[:32])) / 32, rtol=1e-4)


# ---- what changes and what does not ---------------------------------------------------------------------------------


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


@KINDS
def test_the_size_of_a_micro_batch_never_changes_the_weights(
    bench: Callable[..., Bench], adapter: AdapterConfig
) -> None:
    weights = {}
    for size in (1, 40, 1000):
        run = bench(f"micro-{size}", adapter=adapter, num_minibatches=1, optim=optim(micro_batch_tokens=size))
        run.train()
        weights[size] = torch.cat([parameter.detach().flatten() for parameter in trained(run.roles)]).double()
    for size in (1, 40):
        difference = (weights[size] - weights[1000]).norm() / weights[1000].norm()
        assert float(difference) < 1e-5


@KINDS
@pytest.mark.parametrize("critic", [Critic.separate, Critic.shared])
def test_computing_activations_again_changes_no_weight(
    bench: Callable[..., Bench], adapter: AdapterConfig, critic: Critic, monkeypatch: pytest.MonkeyPatch
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


@KINDS
def test_the_same_seed_gives_the_same_weights_and_another_one_does_not(
    bench: Callable[..., Bench], adapter: AdapterConfig
) -> None:
    hashes = []
    for number in range(3):
        run = bench(f"run-{number}", adapter=adapter, seed=int(number == 2))
        run.train()
        hashes.append(sha256(run.roles.policy.parameters()))
    assert hashes[0] == hashes[1] != hashes[2]


# ---- resuming -------------------------------------------------------------------------------------------------------


class _SignalAt(TrainerCallback):
    """Asks this process to stop during a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("adapter", "control"), [(FULL, KlControl.fixed), (LORA, KlControl.adaptive)], ids=["full-fixed", "lora-adaptive"]
)
def test_a_resumed_run_equals_the_straight_one(
    bench: Callable[..., Bench], adapter: AdapterConfig, control: KlControl
) -> None:
    kl = KlConfig(control=control, coefficient=0.2, target=0.01, horizon=20)
    _equals_when_resumed(bench, adapter=adapter, kl=kl)


def test_without_masters_a_resumed_run_equals_the_straight_one(bench: Callable[..., Bench]) -> None:
    """Moments in bfloat16 come back as they were, and so do the random numbers of the rounding."""
    _equals_when_resumed(bench, adapter=replace(FULL, master_weights=False), dtype=Dtype.bfloat16)


def _equals_when_resumed(bench: Callable[..., Bench], **settings: Any) -> None:
    settings |= {"updates": 3, "save_every": 2}
    straight = bench("straight", **settings)
    straight.train()

    stopped = bench("resumed", **settings)
    stopped.trainer.add_callback(_SignalAt(step=2))
    with pytest.raises(Preempted):
        stopped.train()
    names = [path.name for path in stopped.context.checkpoints.iterdir()]
    assert names == ["checkpoint-4"], "it stops where the update ends"

    resumed = bench("resumed", **settings)
    resumed.train()
    assert sha256(trained(resumed.roles)) == sha256(trained(straight.roles))
    assert resumed.trainer.kl_controller == straight.trainer.kl_controller
    assert [line["step"] for line in resumed.metrics()] == [1, 2, 3]
    assert _untimed(resumed) == _untimed(straight)


def _untimed(run: Bench) -> list[dict[str, Any]]:
    """The metrics without those that measure time."""
    return [
        {name: value for name, value in line.items() if not name.startswith("time/") and name != "seconds"}
        for line in run.metrics()
    ]


class _KilledAt(TrainerCallback):
    """Ends the training during a step, as a kill does."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            raise ProcessLookupError


def test_a_killed_run_goes_on_with_the_metrics_of_its_checkpoint(bench: Callable[..., Bench]) -> None:
    """The checkpoint is that of update 2; update 3 is logged when the run ends, and is made again."""
    settings: dict[str, Any] = {"updates": 4, "save_every": 2}
    killed = bench("killed", **settings)
    killed.trainer.add_callback(_KilledAt(step=13))
    with pytest.raises(ProcessLookupError):
        killed.train()
    progress = Progress.read(killed.context.spec.work)
    assert progress is not None
    assert (progress.phase, progress.step, progress.total) == ("training", 3, 4)

    resumed, straight = bench("killed", **settings), bench("straight", **settings)
    resumed.train()
    straight.train()
    assert [line["step"] for line in resumed.metrics()] == [1, 2, 3, 4]
    assert _untimed(resumed) == _untimed(straight)


def test_the_adaptive_coefficient_follows_the_kl(bench: Callable[..., Bench]) -> None:
    kl = KlConfig(control=KlControl.adaptive, coefficient=0.2, target=1e-3, horizon=100)
    run = bench(updates=3, kl=kl)
    run.train()
    coefficients = [line["objective/kl_coef"] for line in run.metrics()] + [run.trainer.kl_controller.coefficient]
    for line, before, after in zip(run.metrics(), coefficients, coefficients[1:], strict=False):
        error = min(max(line["objective/kl"] / 1e-3 - 1.0, -0.2), 0.2)
        close(after, before * (1.0 + error * 8 / 100), rtol=1e-4)
