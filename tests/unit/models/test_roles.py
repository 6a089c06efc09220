"""PPO's four models: what they share, what learns from what, and that the reference is the policy at the start."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignment.config.model import AdapterConfig, Critic
from alignment.models.assembly.adapters import add_adapter
from alignment.models.assembly.heads import ActorCritic
from alignment.models.assembly.load import Lineage, SavedAdapter, load_policy
from alignment.models.assembly.roles import Roles, build_roles, share_frozen
from alignment.models.forward.answers import answer_statistics, answer_stream, unwrapped
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.sft.kind import SftConfig
from tests.oracles.close import close
from tests.tiny import liven, publish_tiny, tiny_model, tiny_reward, tiny_spec
from tests.unit.models.conftest import CPU, FULL, KINDS, LORA, assert_same_gradients, gradients

PART = answer_stream([[5, 6, 2], [9]], [[7, 8, 2], [2]], CPU)


def _roles(
    folder: Path,
    base: Lineage,
    adapter: AdapterConfig,
    reward_adapter: AdapterConfig | None = None,
    critic: Critic = Critic.separate,
) -> Roles:
    reward = tiny_reward(folder, adapter if reward_adapter is None else reward_adapter, start=base)
    return build_roles(tiny_spec(folder, PpoConfig()), base, reward, adapter, device=CPU, critic=critic)


def _addresses(model: torch.nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters()}


def _unshared_bytes(model: torch.nn.Module, owner: torch.nn.Module) -> int:
    owned = _addresses(owner)
    return sum(p.nbytes for p in model.parameters() if p.data_ptr() not in owned)


def test_under_an_adapter_policy_value_and_reward_hold_their_base_once(tmp_path: Path, base: Lineage) -> None:
    """Also after a trainer has moved its model to the same device."""
    roles = _roles(tmp_path, base, LORA)
    own = sum(p.nbytes for p in load_policy(base, torch.float32).parameters())
    roles.actor_critic.to(CPU)
    for model in (roles.actor_critic.value, roles.reward):
        adapters = sum(p.nbytes for n, p in model.named_parameters() if ".lora_" in n or "score" in n)
        assert _unshared_bytes(model, roles.policy) == adapters < own / 2
    assert roles.frozen_reference is None


def test_sharing_takes_equal_frozen_weights_only() -> None:
    owner = tiny_model("qwen2").requires_grad_(False)
    model = copy.deepcopy(owner)
    parameters = dict(model.named_parameters())
    names = list(parameters)
    parameters[names[1]].data.add_(1.0)
    parameters[names[2]].requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    assert share_frozen(model, owner) == len(names) - 2
    now, owned = dict(model.named_parameters()), dict(owner.named_parameters())
    assert [name for name, parameter in now.items() if parameter is not owned[name]] == [names[1], names[2]]
    for name, parameter in now.items():
        assert torch.equal(parameter, before[name])
    assert share_frozen(tiny_model("qwen2").requires_grad_(False), tiny_model("qwen2")) == 0, "the owner trains all"


@KINDS
def test_the_reference_is_the_policy_at_the_start_whatever_is_learned(
    tmp_path: Path, base: Lineage, adapter: AdapterConfig
) -> None:
    """The policy starts from two merged stages, so that it is not the run's base."""
    sft = add_adapter(load_policy(base, torch.float32), LORA, "CAUSAL_LM")
    liven(sft)
    publish_tiny(tiny_spec(tmp_path, SftConfig()), sft, base)
    folder = next((tmp_path / "artifacts").glob("sft-*/adapters/0-sft"))
    roles = _roles(
        tmp_path, Lineage(source=base.source, base=base.base, adapters=(SavedAdapter(path=folder),)), adapter
    )
    start = answer_statistics(unwrapped(sft), PART).logprobs.detach()
    with torch.no_grad():
        for parameter in roles.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    with torch.no_grad(), roles.reference() as reference:
        of_reference = answer_statistics(reference, PART).logprobs
    now = answer_statistics(unwrapped(roles.policy), PART).logprobs.detach()  # the adapter is on again
    close(of_reference, start, rtol=1e-4, atol=1e-5)
    assert float((now - start).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("adapter", "reward_adapter"), [(LORA, LORA), (FULL, FULL), (FULL, LORA)], ids=["lora", "full", "full, lora"]
)
def test_policy_and_value_are_trained_and_the_others_are_not(
    tmp_path: Path, base: Lineage, adapter: AdapterConfig, reward_adapter: AdapterConfig
) -> None:
    roles = _roles(tmp_path, base, adapter, reward_adapter)
    statistics, loss = roles.actor_critic(PART, 1.0, torch.sum)
    (statistics.logprobs.sum() + loss).backward()
    for model in (roles.policy, roles.actor_critic.value):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert any(float(p.grad.abs().sum()) > 0 for p in trained)
    assert all(p.grad is None for p in roles.reward.parameters())
    assert (roles.frozen_reference is None) is (adapter is LORA)
    if roles.frozen_reference is not None:
        assert not any(p.requires_grad for p in roles.frozen_reference.parameters())


def _actor_critic(folder: Path, base: Lineage, adapter: AdapterConfig, critic: Critic) -> ActorCritic:
    actor_critic = _roles(folder, base, adapter, critic=critic).actor_critic
    liven(actor_critic)
    return actor_critic


def _squares(values: Tensor) -> Tensor:
    return 0.3 * values.square().sum()


@KINDS
@pytest.mark.parametrize("critic", [Critic.separate, Critic.shared])
def test_gradients_are_those_of_the_sum_of_both_losses(
    tmp_path: Path, base: Lineage, adapter: AdapterConfig, critic: Critic
) -> None:
    model = _actor_critic(tmp_path, base, adapter, critic)
    twin = copy.deepcopy(model)
    statistics, loss = model(PART, 1.0, _squares)
    (2.0 * (statistics.logprobs.sum() + loss)).backward()
    statistics, values = twin.look(PART, 1.0)
    assert statistics.logprobs.shape == values.shape == (4,)
    (2.0 * (statistics.logprobs.sum() + _squares(values))).backward()
    assert any("value." in name for name in gradients(model))
    assert_same_gradients(model, twin, tolerance=1e-6)


def test_a_critic_on_the_trunk_teaches_it_only_with_the_policy(tmp_path: Path, base: Lineage) -> None:
    model = _actor_critic(tmp_path, base, LORA, Critic.shared)
    model(PART, 1.0, _squares, policy_learns=False)[1].backward()
    assert list(gradients(model)) == ["value.weight"]
