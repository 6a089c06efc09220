"""The four models of PPO: policy and value are trained, reference and reward are frozen. The value model may be absent.

Under an adapter the reference is the policy with its adapter switched off, or as it was at the start. All frozen
weights that policy, value and reward have in common are one tensor in memory. In full training each role has its own
weights.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from peft import PeftModel, TaskType
from torch import nn
from transformers import PreTrainedModel

from alignment.config.model import AdapterConfig, AdapterKind, Critic
from alignment.job import StageInput, StageSpec
from alignment.models.assembly.actor_critic import ActorCritic, ValueHead
from alignment.models.assembly.adapters import at_start
from alignment.models.assembly.load import DTYPES, Lineage, frozen_copy, trained_dtype
from alignment.models.assembly.reward_head import load_reward_model, zero_head
from alignment.models.assembly.start import load_start
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.causal import install_scalar
from alignment.models.forward.flat import use_flat_attention


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """The models of PPO.

    ``frozen_reference`` is None if the reference is the policy with other adapters active. ``reward`` is None if
    answers are not scored by a reward model of a stage.
    """

    actor_critic: ActorCritic
    reward: PreTrainedModel | PeftModel | None
    frozen_reference: PreTrainedModel | None

    @property
    def policy(self) -> PreTrainedModel | PeftModel:
        """The policy as it is trained and saved."""
        return self.actor_critic.policy

    def trained_models(self) -> list[PreTrainedModel]:
        """The trained language model and, if it is a separate model, the value model, without wrappers."""
        value = self.actor_critic.value
        separate = [] if value is None or isinstance(value, ValueHead) else [value]
        return [unwrapped(model) for model in (self.policy, *separate)]

    def frozen_models(self) -> list[PreTrainedModel | PeftModel]:
        """The models that are not trained, beside the policy itself."""
        return [model for model in (self.reward, self.frozen_reference) if model is not None]

    def reference(self) -> AbstractContextManager[PreTrainedModel]:
        """The policy at the start of the stage, for the duration of a ``with`` block."""
        if self.frozen_reference is not None:
            return contextlib.nullcontext(self.frozen_reference)
        return at_start(self.policy)

    def base_copies(self) -> float:
        """Bytes of all roles' matrices divided by the policy's; adapters do not count, and shared memory counts
        once."""
        models = (self.actor_critic, self.reward, self.frozen_reference)
        resident = [_matrices(model) for model in models if model is not None]
        return sum({address: size for sizes in resident for address, size in sizes.items()}.values()) / sum(
            _matrices(self.policy).values()
        )


def _matrices(model: nn.Module) -> dict[int, int]:
    """The memory address of each matrix, with its size in bytes.

    A matrix that is sharded over processes (ZeRO-3) counts whole, and is identified by its parameter.
    """
    sizes = {}
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if len(shape) > 1 and not any(part in name for part in ("lora_", "prompt_encoder")):
            sizes[parameter.data_ptr() or id(parameter)] = shape.numel() * parameter.element_size()
    return sizes


def build_roles(
    spec: StageSpec,
    start: Lineage,
    reward: StageInput | None,
    adapter: AdapterConfig,
    *,
    device: torch.device,
    critic: Critic = Critic.separate,
    values_are_scores: bool = True,
) -> Roles:
    """Loads the models of PPO; ``reward`` is the reward model of a stage, if there is one.

    A separate value model starts from the reward model and is trained in full or by adapter, as the reward model was.
    Without ``values_are_scores`` its head starts at zero, because rewards are on another scale than the reward model's
    scores. Without a reward model the value model starts from the policy, under a head of zeros.

    Every model is on ``device`` before memory is shared, because moving a model later would copy its weights.
    """
    trained = load_start(start, adapter, spec.model.dtype, task=TaskType.CAUSAL_LM, device=device).to(device)
    policy = unwrapped(trained)
    use_flat_attention(policy)
    reference = frozen_copy(policy, DTYPES[spec.model.dtype]) if adapter.kind is AdapterKind.full else None
    scorer = None if reward is None else load_reward_model(spec, reward, device=device).to(device)
    if scorer is not None:
        share_frozen(scorer, trained)
    value: nn.Module | None = None
    if critic is Critic.shared:
        value = ValueHead(policy.get_output_embeddings().weight.shape[1]).to(device)
    elif critic is Critic.separate:
        value = _value_model(spec, start, reward, adapter, device=device).to(device)
        share_frozen(value, trained)
        if reward is None or not values_are_scores:
            zero_head(value)
    return Roles(actor_critic=ActorCritic(trained, value), reward=scorer, frozen_reference=reference)


def _value_model(
    spec: StageSpec, start: Lineage, reward: StageInput | None, adapter: AdapterConfig, *, device: torch.device
) -> PreTrainedModel | PeftModel:
    if reward is not None:
        return load_reward_model(spec, reward, device=device, trained=trained_dtype(spec.model.dtype, adapter))
    model = load_start(start, adapter, spec.model.dtype, task=TaskType.SEQ_CLS, device=device)
    install_scalar(unwrapped(model))
    return model.eval()


def share_frozen(model: nn.Module, owner: nn.Module) -> int:
    """Replaces frozen weights of ``model`` by the owner's where these are equal and frozen; returns how many.

    They become the same parameters, not only the same memory, so that they stay one when sharded over processes
    (ZeRO-3).
    """
    owned = {name: p for name, p in owner.named_parameters(remove_duplicate=False) if not p.requires_grad}
    shared: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        other = owned.get(name)
        if parameter.requires_grad or other is None or other.dtype != parameter.dtype:
            continue
        if id(parameter) in shared or (other.shape == parameter.shape and torch.equal(other, parameter)):
            path, _, own = name.rpartition(".")
            setattr(model.get_submodule(path), own, shared.setdefault(id(parameter), other))
    return len(shared)
