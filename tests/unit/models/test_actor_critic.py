"""Learning from policy and value: the same gradients as from one graph, one model's activations at a time."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.config.critic import Critic
from alignment.models.assembly.actor_critic import ActorCritic
from alignment.models.assembly.load import Lineage
from alignment.models.assembly.roles import build_roles
from alignment.models.forward.answers import answer_stream, unwrapped
from alignment.stages.ppo.config import PpoConfig
from tests.tiny import BASE_SOURCE, liven, save_tiny_model, tiny_reward, tiny_spec

CPU = torch.device("cpu")
PART = answer_stream([[5, 6, 2], [9]], [[7, 8, 2], [2]], CPU)
KINDS = pytest.mark.parametrize(
    "adapter", [AdapterConfig(rank=4), AdapterConfig(kind=AdapterKind.full)], ids=["lora", "full"]
)
CRITICS = pytest.mark.parametrize("critic", [Critic.separate, Critic.shared])


def _actor_critic(folder: Path, adapter: AdapterConfig, critic: Critic) -> ActorCritic:
    base = Lineage(source=BASE_SOURCE, base=save_tiny_model(folder / "base"), adapters=())
    reward = tiny_reward(folder, adapter, start=base)
    actor_critic = build_roles(
        tiny_spec(folder, PpoConfig()), base, reward, adapter, device=CPU, critic=critic
    ).actor_critic
    liven(actor_critic)
    return actor_critic


def _gradients(model: ActorCritic) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _squares(values: Tensor) -> Tensor:
    return 0.3 * values.square().sum()


@KINDS
@CRITICS
def test_gradients_are_those_of_the_sum_of_both_losses(tmp_path: Path, adapter: AdapterConfig, critic: Critic) -> None:
    model = _actor_critic(tmp_path, adapter, critic)
    twin = copy.deepcopy(model)
    statistics, loss = model(PART, 1.0, _squares)
    (2.0 * (statistics.logprobs.sum() + loss)).backward()
    statistics, values = twin.look(PART, 1.0)
    (2.0 * (statistics.logprobs.sum() + _squares(values))).backward()
    gradients, expected = _gradients(model), _gradients(twin)
    assert gradients.keys() == expected.keys()
    assert any("value." in name for name in gradients)
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-6, atol=1e-8), name


@KINDS
def test_a_critic_of_its_own_begins_when_the_policys_gradients_are_there(
    tmp_path: Path, adapter: AdapterConfig
) -> None:
    model = _actor_critic(tmp_path, adapter, Critic.separate)
    learned: list[bool] = []
    trained = [p for p in model.policy.parameters() if p.requires_grad]
    value = unwrapped(model.value)
    value.base_model.embed_tokens.register_forward_hook(
        lambda *_: learned.append(all(p.grad is not None for p in trained))
    )
    statistics, loss = model(PART, 1.0, _squares)
    assert not learned
    (statistics.logprobs.sum() + loss).backward()
    assert learned == [True]


def test_the_later_pass_computes_in_the_format_of_the_first(tmp_path: Path) -> None:
    model = _actor_critic(tmp_path, AdapterConfig(kind=AdapterKind.full), Critic.separate)
    noted_values: list[Tensor] = []

    def noted(values: Tensor) -> Tensor:
        noted_values.append(values.detach())
        return _squares(values)

    with torch.autocast("cpu", torch.bfloat16):
        expected = model.look(PART, 1.0)[1]
        statistics, loss = model(PART, 1.0, noted)
    (statistics.logprobs.sum() + loss).backward()
    assert not torch.equal(expected, model.look(PART, 1.0)[1])
    assert torch.equal(noted_values[0], expected)


def test_a_critic_on_the_trunk_teaches_it_only_with_the_policy(tmp_path: Path) -> None:
    model = _actor_critic(tmp_path, AdapterConfig(rank=4), Critic.shared)
    model(PART, 1.0, _squares, policy_learns=False)[1].backward()
    assert list(_gradients(model)) == ["value.weight"]
