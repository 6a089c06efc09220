"""One optimiser step without a critic, against the papers' formulas in float64. The oracle
(tests/oracles/critic_free.py) has nothing of the trainer but the weights before each step, the prompts, the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from alignment.config.model import Critic
from alignment.stages.ppo.config import Advantage, KlConfig, KlTerm
from tests.oracles import critic_free as oracle
from tests.unit.training.ppo_bench import END, PROMPTS, Bench, Plain, Taken, TokenRewards, Weights, optim, taken

BETA, CLIP, CLIP_HIGH, ENTROPY, TEMPERATURE, GROUP, NEW, MAX_NORM = 0.3, 0.02, 0.05, 0.1, 0.8, 4, 6, 0.01
UNDECIDED = (PROMPTS[1], PROMPTS[4])
"""Prompts whose answers all score alike."""


def without_ties(prompt: Sequence[int], answer: Sequence[int]) -> float:
    return sum(answer) / 16 - 0.8 * len(answer)


def score(prompt: Sequence[int], answer: Sequence[int]) -> float:
    return 1.5 if list(prompt) in UNDECIDED else without_ties(prompt, answer)


def run_of(bench: Callable[..., Bench], method: str, apply_to: KlTerm, **changes: Any) -> Bench:
    settings: dict[str, Any] = {
        "updates": 2,
        "ppo_epochs": 2,
        "num_minibatches": 1,
        "prompts": PROMPTS,
        "reward": False,
        "rewards": TokenRewards(score),
        "advantage": Advantage(method),
        "critic": Critic.none,
        "kl": KlConfig(coefficient=BETA, apply_to=apply_to),
        "completions_per_prompt": GROUP,
        "temperature": TEMPERATURE,
        "max_new_tokens": NEW,
        "clip": CLIP,
        "clip_high": CLIP_HIGH,
        "entropy_coefficient": ENTROPY,
        "drop_ties": True,
        "missing_eos_penalty": 0.0,
        "optim": optim(lr=3e-3, batch_size=len(PROMPTS) * GROUP, micro_batch_tokens=60, max_grad_norm=MAX_NORM),
    }
    return bench(**(settings | changes))


@dataclass
class Step:
    policy: float
    kl: float
    norm: float
    gradients: Weights
    capped: list[float]


def step_of(trace: Taken, number: int, method: str, apply_to: KlTerm, *, entropy: float, drop: bool) -> Step:
    rows = trace.rows[1]
    scores = [score(*row) for row in rows]
    reference, old, new = (Plain(trace.before[at]) for at in (0, 2, number))
    with torch.no_grad():
        start, before = (model.logprobs(rows, TEMPERATURE) for model in (reference, old))
    paid = BETA if apply_to is KlTerm.reward else 0.0
    costs = [float((now - then).sum()) for now, then in zip(before, start, strict=True)]
    rewards = [reward - paid * cost for reward, cost in zip(scores, costs, strict=True)]
    given = oracle.advantages(method, rewards, GROUP)
    tied = oracle.tied(scores, GROUP)
    learned = [row for row in range(len(rows)) if not (drop and tied[row // GROUP])]
    distributions = new.distributions([rows[row] for row in learned], TEMPERATURE)
    logprobs = [each[range(len(each)), rows[row][1]] for each, row in zip(distributions, learned, strict=True)]
    olds, starts = [before[row] for row in learned], [start[row] for row in learned]
    policy = oracle.policy_loss(
        method, logprobs, olds, [given[row] for row in learned], low=CLIP, high=CLIP_HIGH, longest=NEW, exp=torch.exp
    )
    kl = oracle.kl_loss(method, logprobs, starts, longest=NEW, exp=torch.exp)
    every = torch.cat(distributions)
    loss = policy + (BETA * kl if apply_to is KlTerm.loss else 0.0) - entropy * -(every.exp() * every).sum(-1).mean()
    loss.backward()
    named = [("policy." + name, p) for name, p in new.policy.named_parameters()]
    norm = float(torch.cat([p.grad.flatten() for _, p in named]).norm())
    scale = min(1.0, MAX_NORM / norm)
    ratios = torch.cat([(now - then).exp().detach() for now, then in zip(logprobs, olds, strict=True)])
    return Step(
        policy=float(policy.detach()),
        kl=float(kl.detach()),
        norm=norm,
        gradients={name: p.grad * scale for name, p in named},
        capped=[float((ratios < 1 - CLIP).double().mean()), float((ratios > 1 + CLIP_HIGH).double().mean())],
    )


def same_gradients(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((actual[name] - gradient).norm() / gradient.norm()) < 1e-3, name


@pytest.mark.parametrize(
    ("method", "apply_to"), [("rloo", KlTerm.loss), ("grpo", KlTerm.reward), ("dr_grpo", KlTerm.loss)]
)
def test_a_step_without_a_critic_is_what_the_papers_say(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, method: str, apply_to: KlTerm
) -> None:
    """The second epoch of the second update: policy, old policy and reference are three, and both clips bind."""
    run = run_of(bench, method, apply_to)
    assert run.roles.actor_critic.value is None
    assert all(name.startswith("policy.") for name, _ in run.roles.actor_critic.named_parameters())
    trace = taken(run, monkeypatch)
    first, last = (step_of(trace, number, method, apply_to, entropy=ENTROPY, drop=True) for number in (2, 3))
    assert all(0.05 < share < 0.95 for share in last.capped), f"both clips should bind somewhere: {last.capped}"
    assert last.norm > 1.2 * MAX_NORM, "the gradient should be clipped"
    assert {len(answer) for _, answer in trace.rows[1]} > {NEW}, "answers should differ in length"
    figures = run.metrics()[1]
    assert figures["policy/approxkl_first"] < 1e-10
    assert figures["objective/tied_prompts"] == len(UNDECIDED)
    assert figures["loss/policy"] == pytest.approx((first.policy + last.policy) / 2, rel=1e-3, abs=1e-5)
    assert figures["grad_norm"] == pytest.approx(last.norm, rel=1e-3)
    if apply_to is KlTerm.loss:
        assert figures["loss/kl"] == pytest.approx((first.kl + last.kl) / 2, rel=1e-3)
    assert ("loss/kl" in figures) is (apply_to is KlTerm.loss)
    assert not {name for name in figures if "value" in name or "returns" in name or name == "val/clipfrac"}
    assert figures["memory/base_copies"] == pytest.approx(2.0), "policy and reference"
    for number, expected in ((2, first), (3, last)):
        same_gradients(trace.gradients[number], expected.gradients)


def test_with_ties_and_without_an_entropy_bonus_every_prompt_counts(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(bench, "grpo", KlTerm.loss, drop_ties=False, entropy_coefficient=0.0)
    trace = taken(run, monkeypatch)
    expected = step_of(trace, 3, "grpo", KlTerm.loss, entropy=0.0, drop=False)
    same_gradients(trace.gradients[3], expected.gradients)
    assert run.metrics()[1]["objective/tied_prompts"] == len(UNDECIDED)


def test_with_ties_alone_nothing_is_learned(bench: Callable[..., Bench]) -> None:
    rewards = TokenRewards(lambda prompt, answer: float(len(prompt)))  # prompts differ, their answers do not
    run = run_of(bench, "grpo", KlTerm.loss, rewards=rewards, num_minibatches=2)
    before = [p.detach().clone() for p in run.roles.policy.parameters()]
    run.train()
    assert all(torch.equal(p, old) for p, old in zip(run.roles.policy.parameters(), before, strict=True))
    assert [line["objective/tied_prompts"] for line in run.metrics()] == [8.0, 8.0]
    assert [line["objective/tied_share"] for line in run.metrics()] == [1.0, 1.0]
    assert [line["grad_norm"] for line in run.metrics()] == [0.0, 0.0]


def test_minibatches_that_ties_leave_empty_are_passed_over(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt of eight is left for two minibatches."""
    rewards = TokenRewards(lambda prompt, answer: float(sum(answer)) if list(prompt) == PROMPTS[2] else 0.0)
    run = run_of(bench, "dr_grpo", KlTerm.loss, rewards=rewards, num_minibatches=2, updates=1, ppo_epochs=1)
    trace = taken(run, monkeypatch)
    assert [bool(gradients) for gradients in trace.gradients] == [True, False]
    assert run.metrics()[0]["policy/steps"] == 1.0
    assert all(torch.isfinite(gradient).all() for gradient in trace.gradients[0].values())


def test_a_tie_is_of_what_is_maximised(bench: Callable[..., Bench]) -> None:
    """Answers that a scorer cannot tell apart differ if one of them has no end."""
    run = run_of(bench, "grpo", KlTerm.loss, rewards=TokenRewards(lambda prompt, answer: 0.0), missing_eos_penalty=1.0)
    experience = run.trainer._collect(0)
    ended = [answer[-1] == END for answer in experience.answers]
    mixed = [len(set(ended[start : start + GROUP])) == 2 for start in range(0, len(ended), GROUP)]
    assert any(mixed)
    assert not all(mixed)
    learned = {row // GROUP for row in experience.partition.rows_of(0)}
    assert learned == {prompt for prompt, both in enumerate(mixed) if both}
