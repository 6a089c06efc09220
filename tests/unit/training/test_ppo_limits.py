"""What holds PPO back or beside it: warm-up of the critic, early stops, the guard, language modelling, odd scores."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignment.config.model import AdapterConfig, Critic
from alignment.config.optim import Schedule
from alignment.config.scoring import GuardConfig
from alignment.core.errors import ConfigError, NonFiniteError
from alignment.data.tokens.tokenize import TokenizedConversation
from alignment.models.forward.answers import unwrapped
from alignment.rewards.scorers import Scores
from alignment.stages.ppo.collect import warn_of_equal_scores
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.ppo.experience import Prompts, Samples
from alignment.stages.ppo.guard import Guard, better_beyond_noise
from alignment.stages.ppo.kind import KIND
from alignment.stages.ppo.learn import add_scores
from alignment.stages.ppo.ptx import Ptx
from alignment.stages.ppo.run import hold_out
from alignment.stages.ppo.step_metrics import UpdateMetrics
from alignment.stages.ppo.trainer import PpoTrainer
from alignment.training.trackers.all_trackers import Trackers
from tests.tiny import tiny_tokenizer
from tests.unit.training.ppo_bench import END, FULL, LORA, PROMPTS, Bench, TokenRewards, optim, sha256

SHORT = TokenRewards(lambda prompt, answer: -float(len(answer)))


def _policy(run: Bench) -> str:
    return sha256(p for p in run.roles.policy.parameters() if p.requires_grad)


def _critic(run: Bench) -> str:
    return sha256(p for p in run.roles.actor_critic.value.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("adapter", "critic"), [(LORA, Critic.separate), (FULL, Critic.shared)], ids=["lora-separate", "full-shared"]
)
def test_only_the_critic_learns_while_it_warms_up(
    bench: Callable[..., Bench], adapter: AdapterConfig, critic: Critic
) -> None:
    run = bench(adapter=adapter, critic=critic, updates=2, critic_warmup=2)
    policy, value = _policy(run), _critic(run)
    run.train()
    assert _policy(run) == policy
    assert _critic(run) != value
    assert all(abs(line["policy/approxkl"]) < 1e-10 for line in run.metrics())
    after = bench("after", adapter=adapter, critic=critic, updates=2, critic_warmup=1)
    after.train()
    assert _policy(after) != policy
    learned = [p for p in after.roles.policy.parameters() if p.requires_grad]
    counts = {int(after.trainer.optimizer.state[parameter]["step"]) for parameter in learned}
    assert counts == {4}, "Adam counts the two epochs of two minibatches of the second update alone"


def test_a_minibatch_that_moved_too_far_is_the_updates_last(bench: Callable[..., Bench]) -> None:
    settings = {"ppo_epochs": 4, "num_minibatches": 2}
    free, held = (bench(str(limit), max_approxkl=limit, **settings) for limit in (1e3, 1e-9))
    free.train()
    held.train()
    assert [line["policy/steps"] for line in free.metrics()] == [8, 8]
    assert [line["policy/steps"] for line in held.metrics()] == [2, 2], "the second minibatch sees a change"
    assert [line["step"] for line in held.metrics()] == [1, 2]
    assert [line["lr"] for line in held.metrics()] == [line["lr"] for line in free.metrics()], "annealed as before"


def test_minibatches_that_are_passed_over_change_nothing(bench: Callable[..., Bench]) -> None:
    held = bench("held", updates=1, ppo_epochs=4, max_approxkl=1e-9, optim=optim(schedule=Schedule.constant))
    held.train()
    one_epoch = bench("one", updates=1, ppo_epochs=1, optim=optim(schedule=Schedule.constant))
    one_epoch.train()
    assert _policy(held) == _policy(one_epoch)
    assert _critic(held) == _critic(one_epoch)


def test_a_kl_above_the_budget_twice_in_a_row_ends_the_stage(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"ppo_epochs": 1, "num_minibatches": 2, "optim": optim(lr=5e-3), "updates": 6}
    free = bench("free", **settings)
    free.train()
    kls = [line["objective/kl"] for line in free.metrics()]
    limit = max(kls) / 2
    first = next(at for at, (kl, before) in enumerate(zip(kls[1:], kls, strict=False), 1) if min(kl, before) > limit)
    held = bench("held", guard=GuardConfig(max_kl=limit), **settings)
    with caplog.at_level(logging.WARNING):
        held.train()
    assert held.trainer.updates_done == first
    assert f"ends after {first} updates" in caplog.text
    assert held.metrics()[-1]["objective/kl"] == kls[first], "what ended it is the last line"
    assert [line["step"] for line in held.metrics()] == list(range(1, first + 2))
    assert 1 < first < 6


def test_one_batch_above_the_budget_ends_nothing_and_a_resume_remembers_it(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    run = bench(guard=GuardConfig(max_kl=3.0))

    def over(trainer: PpoTrainer, *kls: float) -> list[bool]:
        return [trainer.kl_budget.is_exceeded(kl) for kl in kls]

    assert over(run.trainer, 3.5, 2.9, 3.1) == [False, False, False]
    run.trainer._save_state(tmp_path)
    resumed = bench("resumed", guard=GuardConfig(max_kl=3.0))
    resumed.trainer._restore_state(tmp_path)
    assert over(resumed.trainer, 3.2) == [True]


class ScriptedRewards(TokenRewards):
    def __init__(self, looks: list[list[float]]) -> None:
        super().__init__(lambda prompt, answer: 0.0)
        self._looks = iter(looks)

    def scores(self, prompts: Any, answers: Any, rows: Any) -> Scores:
        return self.named(next(self._looks))


LOW = TokenRewards(lambda prompt, answer: float(sum(token < 12 for token in answer)))
HIGH = TokenRewards(lambda prompt, answer: -float(sum(token < 12 for token in answer)), name="held_out")
WATCHED = {"updates": 4, "optim": optim(lr=5e-3, batch_size=32), "missing_eos_penalty": 0.0}


def _watched(bench: Callable[..., Bench], name: str, **changes: Any) -> Bench:
    guard = GuardConfig(every=1, prompts=8, **changes.pop("guard", {}))
    scorer = changes.pop("scorer", HIGH)
    run = bench(name, rewards=LOW, guard=guard, **{**WATCHED, **changes})
    run.trainer.guard = Guard(
        guard,
        run.context,
        Prompts(ids=[[6, 7, 8], [21, 22], [9], [3, 3], [20], [18, 5, 4], [11, 12], [1, 9]], rows=range(100, 108)),
        scorer=scorer,
        policy=run.roles.policy,
        proxy=run.trainer.collector.scores_of,
    )
    return run


def test_a_policy_above_the_budget_is_never_the_best(bench: Callable[..., Bench]) -> None:
    run = _watched(bench, "run", scorer=LOW)  # likes what is learned: only the budget speaks against it
    run.trainer.guard._config = replace(run.trainer.guard._config, max_kl=1e-3)  # the stage itself goes on
    run.train()
    means = [line["guard/scorer"] for line in run.lines("guard.jsonl")]
    assert max(means) > means[0] + 0.25
    assert run.trainer.guard.best_updates == 0


def test_the_best_policy_by_the_held_out_scorer_is_handed_on(bench: Callable[..., Bench]) -> None:
    """The held-out scorer dislikes what training wants, so it is highest before anything was learned."""
    run = _watched(bench, "run", adapter=LORA)
    start = _policy(run)
    run.train()
    assert _policy(run) != start
    last = run.trainer.guard.finish(run.trainer.updates_done, run.trainer.rollouts)
    lines = run.lines("guard.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    means = [line["guard/scorer"] for line in lines]
    assert means[-1] < means[0] - 0.25
    assert [line["guard/proxy"] for line in lines] == pytest.approx([-mean for mean in means])
    assert lines[0]["guard/kl"] == pytest.approx(0.0, abs=1e-5)
    assert last["guard/kept_update"] == 0
    assert last["guard/best_scorer"] == pytest.approx(means[0])
    again = run.trainer.guard.evaluate(9, run.trainer.rollouts)
    assert again["guard/scorer"] == pytest.approx(means[0]), "the weights are those that did best"
    assert _policy(run) == start


@pytest.mark.parametrize(
    ("later", "earlier", "better"),
    [
        ([1.0, -1.0, 1.0, -0.8], [0.0, 0.0, 0.0, 0.0], False),  # mean .05, standard error .55
        ([5.3, -2.9, 0.2, 9.1], [5.0, -3.0, 0.0, 9.0], True),  # paired: differences .3, .1, .2, .1
        ([2.0, 2.0], [2.0, 2.0], False),
        ([3.0], [2.0], True),
    ],
)
def test_a_later_policy_is_better_by_more_than_a_standard_error(
    later: list[float], earlier: list[float], better: bool
) -> None:
    assert better_beyond_noise(torch.tensor(later), torch.tensor(earlier)) is better


def test_a_policy_that_is_better_by_chance_replaces_no_earlier_one(bench: Callable[..., Bench]) -> None:
    """Scores of eight prompts, look by look; the third mean is the highest, and within noise of the second."""
    looks = [[0.0] * 8, [1.0] * 8, [3.0, -1.0] * 3 + [2.0, 0.2], [0.5] * 8]
    run = _watched(bench, "run", scorer=ScriptedRewards(looks))
    for update in range(4):
        run.trainer.guard.evaluate(update, run.trainer.rollouts)
    lines = run.lines("guard.jsonl")
    assert [line["guard/scorer"] for line in lines] == pytest.approx([0.0, 1.0, 1.025, 0.5])
    assert [line["guard/best_update"] for line in lines] == [0, 1, 1, 1]


def test_the_guard_neither_disturbs_training_nor_forgets_over_a_resume(bench: Callable[..., Bench]) -> None:
    alone = bench("alone", rewards=LOW, **WATCHED)
    alone.train()
    straight = _watched(bench, "straight")
    straight.train()
    assert _policy(straight) == _policy(alone)

    cut = _watched(bench, "cut")
    look = cut.trainer.guard.evaluate

    def breaks(updates: int, rollouts: Any) -> Any:
        metrics = look(updates, rollouts)
        if updates == 2:  # it is looked at again afterwards
            raise KeyboardInterrupt
        return metrics

    cut.trainer.guard.evaluate = breaks
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = _watched(bench, "cut")
    resumed.train()
    for run in (straight, resumed):
        run.trainer.guard.finish(run.trainer.updates_done, run.trainer.rollouts)
    assert resumed.lines("guard.jsonl") == straight.lines("guard.jsonl")
    assert _policy(resumed) == _policy(straight)


def test_held_out_prompts_are_never_learned_from(bench: Callable[..., Bench]) -> None:
    run = bench()
    prompts = Prompts(ids=[*PROMPTS, PROMPTS[0]], rows=range(40, 49))
    config = replace(run.config, guard=GuardConfig(every=1, prompts=3))
    learned, held_out = hold_out(prompts, config, run.context)
    assert len(held_out) == 3
    assert not {tuple(ids) for ids in learned.ids} & {tuple(ids) for ids in held_out.ids}
    assert {tuple(ids) for ids in [*learned.ids, *held_out.ids]} == {tuple(ids) for ids in PROMPTS}
    for part in (learned, held_out):
        assert all(prompts.ids[row - 40] == ids for row, ids in zip(part.rows, part.ids, strict=True))
    with pytest.raises(ConfigError, match="8 prompts cannot be held out of 8 with"):
        hold_out(prompts, replace(config, guard=GuardConfig(every=1, prompts=8)), run.context)


CONVERSATIONS = [
    TokenizedConversation(input_ids=[1, 5, 9, 6, END], labels=[-100, -100, 9, 6, END]),
    TokenizedConversation(input_ids=[1, 7, END, 1, 8, 3, 4, END], labels=[-100, 7, END, -100, -100, 3, 4, END]),
    TokenizedConversation(input_ids=[1, 10, 11], labels=[-100, -100, 11]),
]


def _ptx_loss(run: Bench) -> torch.Tensor:
    losses = []
    for row in CONVERSATIONS:
        ids = torch.tensor([row.input_ids], device=run.context.device)
        logprobs = unwrapped(run.roles.policy)(ids).logits[0].log_softmax(-1)
        losses += [-logprobs[at - 1, label] for at, label in enumerate(row.labels) if label != -100]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("tokens", [1, 1000])
def test_ptx_adds_the_token_mean_of_its_conversations(bench: Callable[..., Bench], tokens: int) -> None:
    run = bench()
    loss = _ptx_loss(run)
    expected = float(loss.detach())
    weights = [p for p in run.roles.policy.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(0.3 * loss, weights)
    ptx = Ptx(CONVERSATIONS, run.context, coefficient=0.3, batch_size=3)
    reported_loss = ptx.add_gradients(unwrapped(run.roles.policy), 0, run.trainer.accelerator, tokens=tokens)
    assert float(reported_loss) == pytest.approx(expected, rel=1e-5)
    for parameter, gradient in zip(weights, gradients, strict=True):
        assert float((parameter.grad - gradient).norm()) <= 1e-5 * max(1.0, float(gradient.norm()))


def test_ptx_keeps_what_it_practises(bench: Callable[..., Bench]) -> None:
    after = {}
    for coefficient in (0.0, 5.0):
        run = bench(f"ptx-{coefficient}", adapter=LORA, updates=3, optim=optim(lr=5e-3))
        if coefficient:
            run.trainer.learner.ptx = Ptx(CONVERSATIONS, run.context, coefficient=coefficient, batch_size=3)
        start = float(_ptx_loss(run).detach())
        run.train()
        after[coefficient] = float(_ptx_loss(run).detach())
        assert ("loss/ptx" in run.metrics()[0]) is bool(coefficient)
    assert after[5.0] < start - 0.1
    assert after[5.0] < after[0.0]


def test_answers_that_all_score_alike_are_warned_of(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    run = bench(rewards=TokenRewards(lambda prompt, answer: 1.0), missing_eos_penalty=0.0, updates=1)
    with caplog.at_level(logging.WARNING):
        run.train()
    assert "all 8 answers of this update score 1" in caplog.text
    assert run.metrics()[0]["objective/score_std"] == 0.0


def _score_metrics(scores: torch.Tensor) -> dict[str, float]:
    metrics = UpdateMetrics(lambda values: values)
    batch: Any = SimpleNamespace(scores=scores, by_scorer=Scores.of({"rule": scores}), parts={})
    add_scores(metrics, batch)
    return metrics.values


def test_equal_scores_do_not_deviate_however_many_they_are() -> None:
    """Their mean may be rounded."""
    deviations = [_score_metrics(torch.full((answers,), 0.1))["objective/score_std"] for answers in range(2, 100)]
    assert deviations == [0.0] * 98
    assert _score_metrics(torch.tensor([0.0, 2.0]))["objective/score_std"] == 1.0


def test_one_score_alone_says_nothing_about_differences(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_equal_scores(torch.tensor([0.5]))
    assert caplog.text == ""
    assert "objective/score_std" not in _score_metrics(torch.tensor([0.5]))
    declared = [KIND.outcome.metrics(PpoConfig(optim=optim(batch_size=size))).training for size in (1, 2)]
    assert ["objective/score_std" in names for names in declared] == [False, True]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (3e19, "loss/value is inf at step 1"),
        (1e30, r"a gradient is not finite at optimiser step 1 \(their norm is inf\)"),
    ],
)
def test_an_infinite_loss_or_norm_ends_the_stage_before_anything_is_kept(
    bench: Callable[..., Bench], score: float, message: str
) -> None:
    """Both come of finite gradients, which clipping by an infinite norm makes zeros."""
    run = bench(rewards=TokenRewards(lambda prompt, answer: score if prompt == PROMPTS[0] else 0.0), updates=2)
    with pytest.raises(NonFiniteError, match=message) as caught:
        run.train()
    assert caught.value.exit_code == 6
    assert not list(run.context.checkpoints.iterdir())


@pytest.mark.parametrize(
    ("adapter", "critic", "reward", "copies"),
    [
        (LORA, Critic.separate, True, 1.0),
        (LORA, Critic.shared, False, 1.0),
        (FULL, Critic.shared, False, 2.0),
        (FULL, Critic.separate, True, 4.0),
    ],
)
def test_copies_of_the_base_are_counted(
    bench: Callable[..., Bench], adapter: AdapterConfig, critic: Critic, reward: bool, copies: float
) -> None:
    run = bench(adapter=adapter, critic=critic, reward=reward, rewards=None if reward else SHORT)
    assert run.roles.base_copies() == pytest.approx(copies, abs=0.02)  # scalar heads count a little


def test_a_few_answers_of_every_update_can_be_read(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file, and in trackers."""
    sent: dict[str, Any] = {}
    monkeypatch.setattr(Trackers, "table", lambda self, name, rows: sent.update({name: rows}))
    run = bench(completions_per_prompt=2, rewards=SHORT, missing_eos_penalty=0.0)
    run.trainer.samples = Samples(run.context, tiny_tokenizer(), group=2, number=3)
    run.train()
    lines = run.lines("samples.jsonl")
    assert [line["step"] for line in lines] == [0, 0, 0, 1, 1, 1]
    for line in lines:
        assert {"row", "prompt", "answer", "score", "kl", "scorers"} <= set(line)
        assert line["scorers"] == {"rule": line["score"]}
        assert math.isfinite(line["kl"])
    assert len({line["row"] for line in lines[:3]}) == 3
    assert {line["row"] for line in lines} <= {40 + number for number in range(8)}, "rows of the data"
    assert sent == {"samples": lines}
