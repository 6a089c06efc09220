"""PPO's four models: what they share, what is trained, and that the reference is the policy at the start."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.models.assembly.adapters import add_adapter
from alignment.models.assembly.load import Lineage, SavedAdapter, load_policy
from alignment.models.assembly.reward_head import load_reward_model
from alignment.models.assembly.roles import Roles, build_roles, share_frozen
from alignment.models.forward.answers import answer_statistics, answer_stream, scalar_scores, unwrapped
from alignment.models.forward.rows import stream
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.sft.config import SftConfig
from tests.oracles.close import close
from tests.tiny import BASE_SOURCE, liven, publish_tiny, save_tiny_model, tiny_model, tiny_reward, tiny_spec

CPU = torch.device("cpu")
LORA = AdapterConfig(rank=4)
FULL = AdapterConfig(kind=AdapterKind.full)
PART = answer_stream([[5, 6, 2], [9]], [[7, 8, 2], [2]], CPU)
KINDS = pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])


@pytest.fixture
def base(tmp_path: Path) -> Lineage:
    """A model folder as a run's base."""
    return Lineage(source=BASE_SOURCE, base=save_tiny_model(tmp_path / "base"), adapters=())


def _roles(folder: Path, base: Lineage, adapter: AdapterConfig, reward_adapter: AdapterConfig | None = None) -> Roles:
    reward = tiny_reward(folder, adapter if reward_adapter is None else reward_adapter, start=base)
    return build_roles(tiny_spec(folder, PpoConfig()), base, reward, adapter, device=CPU)


def _addresses(model: torch.nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters()}


def _unshared_bytes(model: torch.nn.Module, owner: torch.nn.Module) -> int:
    owned = _addresses(owner)
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.data_ptr() not in owned)


def test_under_an_adapter_policy_value_and_reward_hold_their_base_once(tmp_path: Path, base: Lineage) -> None:
    roles = _roles(tmp_path, base, LORA)
    plain = load_policy(base, torch.float32)
    own = sum(p.numel() * p.element_size() for p in plain.parameters())
    for model in (roles.actor_critic.value, roles.reward):
        unshared = _unshared_bytes(model, roles.policy)
        adapters = sum(
            p.numel() * p.element_size() for n, p in model.named_parameters() if ".lora_" in n or "score" in n
        )
        assert unshared == adapters < own / 2
    assert roles.frozen_reference is None


def test_moving_to_the_same_device_keeps_the_memory_shared(tmp_path: Path, base: Lineage) -> None:
    """A trainer moves its model once more; that must not undo the sharing."""
    roles = _roles(tmp_path, base, LORA)
    before = _unshared_bytes(roles.reward, roles.policy)
    roles.actor_critic.to(CPU)
    assert _unshared_bytes(roles.reward, roles.policy) == before


def test_in_full_training_every_role_has_weights_of_its_own(tmp_path: Path, base: Lineage) -> None:
    roles = _roles(tmp_path, base, FULL)
    models = (roles.policy, roles.actor_critic.value, roles.reward, roles.frozen_reference)
    addresses = [_addresses(model) for model in models]
    assert sum(map(len, addresses)) == len(set.union(*addresses))


def test_sharing_takes_equal_frozen_weights_only() -> None:
    owner = tiny_model("qwen2").requires_grad_(False)
    model = copy.deepcopy(owner)
    names = [name for name, _ in model.named_parameters()]
    parameters = dict(model.named_parameters())
    parameters[names[1]].data[0, 0] += 1.0
    parameters[names[2]].requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    assert share_frozen(model, owner) == len(names) - 2
    now, owned = dict(model.named_parameters()), dict(owner.named_parameters())
    assert [name for name, parameter in now.items() if parameter is not owned[name]] == [names[1], names[2]]
    for name, parameter in now.items():
        assert torch.equal(parameter, before[name])


def test_what_the_owner_trains_is_never_shared() -> None:
    owner, model = tiny_model(), tiny_model().requires_grad_(False)
    assert share_frozen(model, owner) == 0


@KINDS
def test_sharing_changes_no_score(tmp_path: Path, base: Lineage, adapter: AdapterConfig) -> None:
    reward = tiny_reward(tmp_path, adapter, start=base)
    spec = tiny_spec(tmp_path, PpoConfig())
    rows = stream([[5, 6, 2], [7, 7, 7, 2]], CPU)
    unshared = scalar_scores(load_reward_model(spec, reward, device=CPU), rows)
    roles = build_roles(spec, base, reward, adapter, device=CPU)
    close(scalar_scores(roles.reward, rows), unshared)
    close(scalar_scores(roles.actor_critic.value, rows), unshared)


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
    now = answer_statistics(unwrapped(roles.policy), PART).logprobs.detach()
    close(of_reference, start, rtol=1e-4, atol=1e-5)
    assert float((now - start).abs().max()) > 0.1


def test_the_adapter_is_on_again_after_the_reference_was_asked(tmp_path: Path, base: Lineage) -> None:
    roles = _roles(tmp_path, base, LORA)
    liven(roles.policy)
    before = answer_statistics(unwrapped(roles.policy), PART).logprobs
    with roles.reference() as reference:
        assert not torch.equal(answer_statistics(reference, PART).logprobs, before)
    assert torch.equal(answer_statistics(unwrapped(roles.policy), PART).logprobs, before)


@KINDS
def test_policy_and_value_are_trained_and_the_others_are_not(
    tmp_path: Path, base: Lineage, adapter: AdapterConfig
) -> None:
    roles = _roles(tmp_path, base, adapter)
    statistics, loss = roles.actor_critic(PART, 1.0, torch.sum)
    (statistics.logprobs.sum() + loss).backward()
    for model in (roles.policy, roles.actor_critic.value):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert any(float(p.grad.abs().sum()) > 0 for p in trained)
    assert all(p.grad is None for p in roles.reward.parameters())
    if roles.frozen_reference is not None:
        assert not any(p.requires_grad for p in roles.frozen_reference.parameters())


def test_a_full_policy_beside_an_adapter_reward_model_works(tmp_path: Path, base: Lineage) -> None:
    roles = _roles(tmp_path, base, FULL, LORA)
    assert roles.frozen_reference is not None
    statistics, values = roles.actor_critic.look(PART, 1.0)
    assert statistics.logprobs.shape == values.shape == (4,)
