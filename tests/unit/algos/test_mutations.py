"""Deliberate faults, each put in the place of the right function: the check against the oracle must turn red."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.algos import gae, group, kl, masked, ppo
from tests.unit.algos.checks import CHECKS
from tests.unit.algos.conftest import random_batch

LENGTHS = [3, 7, 1, 5]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutation:
    """``fault(right)`` gives what replaces ``module.name``; each of ``checks`` has to notice it."""

    module: ModuleType
    name: str
    fault: Callable[[Any], Any]
    checks: tuple[str, ...]


def _arguments(change: Callable[..., tuple[Any, ...]], **named: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The right function on changed arguments."""

    def fault(right: Any) -> Any:
        def wrong(*args: Any, **kwargs: Any) -> Any:
            return right(*change(*args), **{key: named.get(key, lambda v: v)(value) for key, value in kwargs.items()})

        return wrong

    return fault


def _result(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The right function with a changed result."""
    return lambda right: lambda *args, **kwargs: change(right(*args, **kwargs))


def _instead(wrong: Any) -> Callable[[Any], Any]:
    """Another function altogether."""
    return lambda _: wrong


def _same(*args: Any) -> tuple[Any, ...]:
    return args


def _shorter(mask: Tensor) -> Tensor:
    """Off by one: the last counted token is missing (a one-token answer keeps its token)."""
    return mask & (torch.arange(mask.shape[1]) < (mask.sum(-1, keepdim=True) - 1).clamp(min=1))


def _longer(mask: Tensor) -> Tensor:
    """Off by one: the token behind the EOS counts as well."""
    return mask | (torch.arange(mask.shape[1]) == mask.sum(-1, keepdim=True))


def _score_at(position_of: Callable[[Tensor], Tensor]) -> Any:
    def wrong(scores: Tensor, costs: Tensor, response_mask: Tensor, *, kl_coefficient: float) -> Tensor:
        rewards = -kl_coefficient * costs * response_mask
        return rewards.scatter_add(-1, position_of(response_mask)[:, None], scores[:, None])

    return wrong


def _score_on_every_token(scores: Tensor, costs: Tensor, response_mask: Tensor, *, kl_coefficient: float) -> Tensor:
    return (scores[:, None] - kl_coefficient * costs) * response_mask


def _mean_of_row_means(values: Tensor, mask: Tensor) -> Tensor:
    return ((values * mask).sum(-1) / mask.sum(-1)).mean()


def _mean_over_padding_too(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).mean()


def _not_centred(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    return values * torch.rsqrt(masked.masked_variance(values, mask) + eps) * mask


def _policy_loss(worse: Any, *, clip_change: Callable[[float], float] = lambda clip: clip, sign: float = -1.0) -> Any:
    def wrong(
        ratio: Tensor, advantages: Tensor, response_mask: Tensor, *, clip: float, clip_high: float | None = None
    ) -> Tensor:
        near = ratio.clamp(1.0 - clip_change(clip), 1.0 + clip_change(clip_high or clip))
        return (worse(sign * advantages * ratio, sign * advantages * near) * response_mask).sum()

    return wrong


def _value_loss(near: Callable[..., Tensor], worse: Any = torch.maximum, factor: float = 0.5) -> Any:
    def wrong(values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, *, clip: float) -> Tensor:
        clipped = near(values, old_values, returns, clip)
        return factor * (worse((values - returns) ** 2, (clipped - returns) ** 2) * response_mask).sum()

    return wrong


def _near_old(values: Tensor, old_values: Tensor, _: Tensor, clip: float) -> Tensor:
    return old_values + (values - old_values).clamp(-clip, clip)


def _late_values(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The value after a token instead of the one before it."""
    return rewards, torch.nn.functional.pad(values[:, 1:], (0, 1)), mask


def _unbounded(self: kl.AdaptiveKl, seen: float, num_episodes: int) -> kl.AdaptiveKl:
    factor = 1.0 + (seen / self.target - 1.0) * num_episodes / self.horizon
    return replace(self, coefficient=self.coefficient * factor)


def _of_other_groups(scores: Tensor, size: int) -> Tensor:
    """The answers to a prompt taken for those in the same place of all prompts."""
    return scores.view(-1, size).T.reshape(-1)


def _of_all(scores: Tensor, _: int) -> Tensor:
    return scores - scores.mean()


_UPDATE = "whole_update"
_GAE = ("advantages_and_returns", _UPDATE)
_REWARDS = ("token_rewards", _UPDATE)
_POLICY = ("clipped_policy_loss", _UPDATE)
_VALUE = ("clipped_value_loss", _UPDATE)

MUTATIONS: dict[str, Mutation] = {
    "KL with the wrong sign": Mutation(
        module=kl, name="k1", fault=_arguments(lambda a, b: (b, a)), checks=("k1", _UPDATE)
    ),
    "k2 where k1 belongs": Mutation(
        module=kl, name="k1", fault=_instead(lambda a, b: 0.5 * (a - b) ** 2), checks=("k1", _UPDATE)
    ),
    "k3 of the reversed ratio": Mutation(module=kl, name="k3", fault=_arguments(lambda a, b: (b, a)), checks=("k3",)),
    "adaptive KL without its bounds": Mutation(
        module=kl.AdaptiveKl, name="after", fault=_instead(_unbounded), checks=("adaptive_kl",)
    ),
    "adaptive KL that lowers the price when KL is high": Mutation(
        module=kl.AdaptiveKl,
        name="after",
        fault=_arguments(lambda self, seen, n: (self, 2 * self.target - seen, n)),
        checks=("adaptive_kl",),
    ),
    "KL is rewarded instead of charged": Mutation(
        module=gae, name="token_rewards", fault=_arguments(_same, kl_coefficient=lambda v: -v), checks=_REWARDS
    ),
    "score on the first token": Mutation(
        module=gae, name="token_rewards", fault=_instead(_score_at(lambda m: m.sum(-1) * 0)), checks=_REWARDS
    ),
    "score on the last column, padding or not": Mutation(
        module=gae,
        name="token_rewards",
        fault=_instead(_score_at(lambda m: torch.full((len(m),), m.shape[1] - 1))),
        checks=_REWARDS,
    ),
    "score one token behind the EOS": Mutation(
        module=gae,
        name="token_rewards",
        fault=_instead(_score_at(lambda m: m.sum(-1).clamp(max=m.shape[1] - 1))),
        checks=_REWARDS,
    ),
    "score one token before the EOS": Mutation(
        module=gae,
        name="token_rewards",
        fault=_instead(_score_at(lambda m: (m.sum(-1) - 2).clamp(min=0))),
        checks=_REWARDS,
    ),
    "score on every token": Mutation(
        module=gae, name="token_rewards", fault=_instead(_score_on_every_token), checks=_REWARDS
    ),
    "KL charged behind the EOS": Mutation(
        module=gae,
        name="token_rewards",
        fault=lambda right: lambda s, c, m, **k: right(s, c, m, **k) - k["kl_coefficient"] * c * ~m,
        checks=("token_rewards",),
    ),
    "lambda ignored": Mutation(
        module=gae, name="advantages_and_returns", fault=_arguments(_same, gae_lambda=lambda _: 1.0), checks=_GAE
    ),
    "gamma ignored": Mutation(
        module=gae,
        name="advantages_and_returns",
        fault=_arguments(_same, gamma=lambda _: 1.0),
        checks=("advantages_and_returns",),
    ),
    "value read after the token": Mutation(
        module=gae, name="advantages_and_returns", fault=_arguments(_late_values), checks=_GAE
    ),
    "GAE mask one token short": Mutation(
        module=gae, name="advantages_and_returns", fault=_arguments(lambda r, v, m: (r, v, _shorter(m))), checks=_GAE
    ),
    "GAE mask one token long": Mutation(
        module=gae, name="advantages_and_returns", fault=_arguments(lambda r, v, m: (r, v, _longer(m))), checks=_GAE
    ),
    "values behind the EOS leak into GAE": Mutation(
        module=gae,
        name="advantages_and_returns",
        fault=lambda right: lambda r, v, m, **k: tuple(t * m for t in right(r, v, torch.ones_like(m), **k)),
        checks=_GAE,
    ),
    "returns without the values": Mutation(
        module=gae, name="advantages_and_returns", fault=_result(lambda pair: (pair[0], pair[0])), checks=_GAE
    ),
    "mean of row means": Mutation(
        module=masked,
        name="masked_mean",
        fault=_instead(_mean_of_row_means),
        checks=("masked_mean", "masked_variance", "center_and_scale", "scale_only", _UPDATE),
    ),
    "mean over padding too": Mutation(
        module=masked,
        name="masked_mean",
        fault=_instead(_mean_over_padding_too),
        checks=("masked_mean", "masked_variance", "center_and_scale", "scale_only", _UPDATE),
    ),
    "unbiased variance": Mutation(
        module=masked,
        name="masked_variance",
        fault=lambda right: lambda v, m: right(v, m) * m.sum() / (m.sum() - 1),
        checks=("masked_variance", "center_and_scale", "scale_only", _UPDATE),
    ),
    "advantages not centred": Mutation(
        module=masked, name="center_and_scale", fault=_instead(_not_centred), checks=("center_and_scale", _UPDATE)
    ),
    "scaling that drops the mean": Mutation(
        module=masked,
        name="scale_only",
        fault=lambda _: lambda v, m: masked.center_and_scale(v, m),
        checks=("scale_only",),
    ),
    "whitening that fills padding": Mutation(
        module=masked,
        name="center_and_scale",
        fault=lambda right: lambda v, m: right(v, m) + v * ~m,
        checks=("center_and_scale",),
    ),
    "policy loss with the wrong sign": Mutation(
        module=ppo,
        name="clipped_policy_loss",
        fault=_instead(_policy_loss(torch.minimum, sign=1.0)),
        checks=_POLICY,
    ),
    "the better of the two policy losses": Mutation(
        module=ppo, name="clipped_policy_loss", fault=_instead(_policy_loss(torch.minimum)), checks=_POLICY
    ),
    "policy loss never clipped": Mutation(
        module=ppo, name="clipped_policy_loss", fault=_instead(_policy_loss(lambda plain, _: plain)), checks=_POLICY
    ),
    "policy loss always clipped": Mutation(
        module=ppo, name="clipped_policy_loss", fault=_instead(_policy_loss(lambda _, near: near)), checks=_POLICY
    ),
    "policy clip twice as wide": Mutation(
        module=ppo, name="clipped_policy_loss", fault=_arguments(_same, clip=lambda v: 2 * v), checks=_POLICY
    ),
    "policy loss over padding too": Mutation(
        module=ppo,
        name="clipped_policy_loss",
        fault=_arguments(lambda r, a, m: (r, a, torch.ones_like(m))),
        checks=("clipped_policy_loss",),
    ),
    "policy loss mask one token short": Mutation(
        module=ppo, name="clipped_policy_loss", fault=_arguments(lambda r, a, m: (r, a, _shorter(m))), checks=_POLICY
    ),
    "policy loss as a mean": Mutation(
        module=ppo,
        name="clipped_policy_loss",
        fault=lambda right: lambda r, a, m, **k: right(r, a, m, **k) / m.sum(),
        checks=_POLICY,
    ),
    "ratio upside down": Mutation(module=ppo, name="log_ratio", fault=_arguments(lambda a, b: (b, a)), checks=_POLICY),
    "one clip for both directions": Mutation(
        module=ppo,
        name="clipped_policy_loss",
        fault=_arguments(_same, clip_high=lambda _: None),
        checks=("asymmetric_policy_loss",),
    ),
    "the upper clip below and the lower one above": Mutation(
        module=ppo,
        name="clipped_policy_loss",
        fault=lambda right: lambda r, a, m, *, clip, clip_high: right(r, a, m, clip=clip_high, clip_high=clip),
        checks=("asymmetric_policy_loss",),
    ),
    "an answer's ratio upside down": Mutation(
        module=ppo,
        name="answer_log_ratio",
        fault=_arguments(lambda new, old, m: (old, new, m)),
        checks=("answer_log_ratio",),
    ),
    "an answer's ratio over padding too": Mutation(
        module=ppo,
        name="answer_log_ratio",
        fault=_arguments(lambda new, old, m: (new, old, torch.ones_like(m))),
        checks=("answer_log_ratio",),
    ),
    "an answer's ratio as a mean": Mutation(
        module=ppo,
        name="answer_log_ratio",
        fault=lambda right: lambda new, old, m: right(new, old, m) / m.sum(-1, keepdim=True),
        checks=("answer_log_ratio",),
    ),
    "a score among the others": Mutation(
        module=group, name="leave_one_out", fault=_instead(group.group_centered), checks=("leave_one_out",)
    ),
    "leave-one-out with the wrong sign": Mutation(
        module=group, name="leave_one_out", fault=_result(torch.neg), checks=("leave_one_out",)
    ),
    "a group's deviation ignored": Mutation(
        module=group, name="group_standardized", fault=_instead(group.group_centered), checks=("group_standardized",)
    ),
    "a group's deviation biased": Mutation(
        module=group,
        name="group_standardized",
        fault=lambda right: lambda s, size: right(s, size) * (size / (size - 1)) ** 0.5,
        checks=("group_standardized",),
    ),
    "standardised with the wrong sign": Mutation(
        module=group, name="group_standardized", fault=_result(torch.neg), checks=("group_standardized",)
    ),
    "centred over all prompts": Mutation(
        module=group, name="group_centered", fault=_instead(_of_all), checks=("group_centered",)
    ),
    "centred with the wrong sign": Mutation(
        module=group, name="group_centered", fault=_result(torch.neg), checks=("group_centered",)
    ),
    "ties turned over": Mutation(
        module=group, name="tied_groups", fault=_result(torch.logical_not), checks=("tied_groups",)
    ),
    "ties across prompts": Mutation(
        module=group,
        name="tied_groups",
        fault=_arguments(lambda scores, size: (_of_other_groups(scores, size), size)),
        checks=("tied_groups",),
    ),
    "values clipped around the return": Mutation(
        module=ppo,
        name="clipped_value_loss",
        fault=_instead(_value_loss(lambda v, _, g, clip: g + (v - g).clamp(-clip, clip), worse=torch.minimum)),
        checks=_VALUE,
    ),
    "the better of the two value losses": Mutation(
        module=ppo,
        name="clipped_value_loss",
        fault=_instead(_value_loss(_near_old, worse=torch.minimum)),
        checks=_VALUE,
    ),
    "value loss without its half": Mutation(
        module=ppo, name="clipped_value_loss", fault=_instead(_value_loss(_near_old, factor=1.0)), checks=_VALUE
    ),
    "a value clip where there is none": Mutation(
        module=ppo,
        name="clipped_value_loss",
        fault=_arguments(_same, clip=lambda clip: clip or 0.2),
        checks=("unclipped_value_loss",),
    ),
    "value clip ignored": Mutation(
        module=ppo, name="clipped_value_loss", fault=_arguments(_same, clip=lambda _: 1e9), checks=_VALUE
    ),
    "value loss over padding too": Mutation(
        module=ppo,
        name="clipped_value_loss",
        fault=_arguments(lambda v, o, g, m: (v, o, g, torch.ones_like(m))),
        checks=("clipped_value_loss",),
    ),
    "explained variance over padding too": Mutation(
        module=ppo,
        name="explained_variance",
        fault=_arguments(lambda v, g, m: (v, g, torch.ones_like(m))),
        checks=("explained_variance",),
    ),
    "unexplained variance": Mutation(
        module=ppo, name="explained_variance", fault=_result(lambda v: 1.0 - v), checks=("explained_variance",)
    ),
}


@pytest.mark.parametrize(
    ("mutation", "check"),
    [
        pytest.param(mutation, check, id=f"{name} – {check}")
        for name, mutation in MUTATIONS.items()
        for check in mutation.checks
    ],
)
def test_a_fault_never_passes_its_check(monkeypatch: pytest.MonkeyPatch, mutation: Mutation, check: str) -> None:
    batch = random_batch(LENGTHS, seed=1)
    CHECKS[check](batch)
    monkeypatch.setattr(mutation.module, mutation.name, mutation.fault(getattr(mutation.module, mutation.name)))
    with pytest.raises(AssertionError):
        CHECKS[check](batch)


def test_every_check_is_needed_by_some_fault() -> None:
    assert {check for mutation in MUTATIONS.values() for check in mutation.checks} == set(CHECKS)
