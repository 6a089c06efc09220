"""Where the training of a model starts, and the models of a stage by their roles."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, TaskType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import PreTrainedModel

from alignment.config.model import CONTINUE, AdapterConfig, AdapterKind, Chain, Critic, Dtype
from alignment.core.errors import ConfigError
from alignment.job import StageInput, StageSpec
from alignment.models.assembly.adapters import (
    add_adapter,
    add_frozen,
    at_start,
    is_prefix,
    on_embeddings,
    saved_config,
    train_on,
)
from alignment.models.assembly.heads import ActorCritic, ValueHead, load_reward_model, zero_head
from alignment.models.assembly.load import (
    DTYPES,
    Lineage,
    SavedAdapter,
    frozen_copy,
    load_policy,
    load_scalar,
    trained_dtype,
    weights_dtype,
)
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.causal import install_scalar
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.side_by_side import keep_in_one_stream
from alignment.models.kernels.nf4 import quantize_trunk, refuse_mostly_whole


def load_start(
    start: Lineage,
    adapter: AdapterConfig,
    compute: Dtype,
    *,
    task: TaskType,
    device: torch.device,
    sharded: bool = False,
) -> PreTrainedModel | PeftModel:
    """The policy ``start``, ready to be trained with ``adapter``; under a scalar head for ``SEQ_CLS``. Adapters of
    earlier stages are merged into the weights or stay beside them, as configured by ``adapter.chain``. Weights in four
    bits are quantised on ``device``; the caller moves the rest. If the weights will be ``sharded`` and all are trained,
    they stay mapped until they are cut (weight_file.py). Frozen weights in the compute dtype are mapped anyway. Raises
    ConfigError: there is no adapter to continue, it has another shape, or adapters cannot stay beside the weights.
    Raises ModelError: an adapter does not fit the model."""
    continues = adapter.kind is AdapterKind.prefix and adapter.chain is CONTINUE
    if not continues and any(is_prefix(saved.path) for saved in start.adapters):
        raise ConfigError(
            "the stage starts from a prefix, which cannot be merged into weights",
            where="adapter",
            remedy="continue it (adapter.kind=prefix, adapter.chain=continue), or train a low-rank adapter in the "
            "earlier stage",
        )
    load = load_policy if task is TaskType.CAUSAL_LM else load_scalar
    dtype = weights_dtype(compute, adapter)
    if adapter.kind is AdapterKind.full:
        model = load(start, dtype, mapped=sharded)
        keep_in_one_stream(model)
        return model
    if adapter.chain is CONTINUE and not start.adapters:
        raise ConfigError(
            "there is no adapter to continue: the stage starts from a whole model",
            where="adapter.chain",
            remedy="set it to merge, or set init to a stage that trained an adapter",
        )
    below, beside = (start, ()) if adapter.chain is Chain.merge else (start.weights, start.beside)
    _refuse_other_weights(beside, adapter)
    model = load(below, dtype)
    _refuse_unmerged(model, beside, adapter)
    if adapter.kind is AdapterKind.qlora:
        refuse_mostly_whole(model)
        quantize_trunk(model, device)
    continued = beside[-1:] if adapter.chain is CONTINUE else ()
    trained = train_on(model, continued[0].path, adapter, task) if continued else add_adapter(model, adapter, task)
    frozen = beside[: len(beside) - len(continued)]
    keep_in_one_stream(model)
    return add_frozen(trained, [saved.path for saved in frozen]) if frozen else trained


def _refuse_unmerged(model: PreTrainedModel, beside: Sequence[SavedAdapter], adapter: AdapterConfig) -> None:
    """Refuses adapters that stay beside the weights, but have parts that would be left out there: modules that were
    trained whole, except the head of a reward model, and factors on the head or the embeddings. Raises ConfigError:
    there is such an adapter."""
    for saved in beside:
        config = saved_config(saved.path)
        whole = {name.rpartition(".")[2] for name in config.modules_to_save or ()}.difference(SEQ_CLS_HEAD_NAMES)
        targets = getattr(config, "target_modules", None) or ()
        factors = "" if isinstance(targets, str) else on_embeddings(model, targets)
        if names := ", ".join(sorted(whole)) or factors:
            raise ConfigError(
                f"{saved.path.name} has trained {names}, which can only be merged, but adapter.chain is "
                f"{adapter.chain.value!r}",
                where="adapter.chain",
                remedy="set it to merge",
            )


def _refuse_other_weights(beside: Sequence[SavedAdapter], adapter: AdapterConfig) -> None:
    """Refuses adapters beside weights of another kind than they were trained on: after weights in four bits, whole ones
    are another policy; and from the packed bytes of weights in four bits PEFT would compute wrong norms for DoRA."""
    in_four_bits = adapter.kind is AdapterKind.qlora
    fault = ""
    if beside and beside[-1].nf4 and not in_four_bits:
        name = beside[-1].path.name
        fault = f"{name} was trained on weights in four bits, but adapter.kind is {adapter.kind.value!r} and"
    for saved in beside if in_four_bits else ():
        if getattr(saved_config(saved.path), "use_dora", False):
            fault = f"{saved.path.name} is a DoRA adapter, which needs weights that are not in four bits, but"
    if fault:
        raise ConfigError(
            f"{fault} adapter.chain is {adapter.chain.value!r}",
            where="adapter.chain",
            remedy="set it to merge" if in_four_bits else "set it to merge, or use adapter=qlora",
        )


def turn_off_dropout(model: nn.Module) -> None:
    """Turns dropout off permanently and in every mode: in the base model, in attention, and in loaded adapters."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            named = vars(holder).items() if holder else ()  # as attention_dropout of Llama, hidden_dropout of Falcon
            rates = [name for name, value in named if name.endswith("dropout") and isinstance(value, float)]
            for name in rates:
                setattr(holder, name, 0.0)


def adapters_below(start: Lineage, adapter: AdapterConfig) -> tuple[SavedAdapter, ...]:
    """The adapters of the starting policy that stay below the stage's own in its result."""
    return start.adapters[:-1] if adapter.chain is CONTINUE else start.adapters


def saved_as(start: Lineage, adapter: AdapterConfig, folder: Path) -> SavedAdapter:
    """The stage's own adapter, saved in ``folder``, with how it was applied in training."""
    if adapter.chain is CONTINUE:
        merged = start.adapters[-1].merged
    else:
        merged = adapter.chain is Chain.merge or not start.adapters
    return SavedAdapter(path=folder, merged=merged, nf4=adapter.kind is AdapterKind.qlora)


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """The models of PPO. ``frozen_reference`` is None if the reference is the policy with other adapters active.
    ``reward`` is None if answers are not scored by a reward model of a stage."""

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
    """The memory address of each matrix, with its size in bytes. A matrix that is sharded over processes (ZeRO-3)
    counts whole, and is identified by its parameter."""
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
    """Loads the models of PPO; ``reward`` is the reward model of a stage, if there is one. A separate value model
    starts from the reward model and is trained in full or by adapter, as the reward model was. Without
    ``values_are_scores`` its head starts at zero, because rewards are on another scale than the reward model's scores.
    Without a reward model the value model starts from the policy, under a head of zeros. Every model is on ``device``
    before memory is shared, because moving a model later would copy its weights."""
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
    """Replaces frozen weights of ``model`` by the owner's where these are equal and frozen; returns how many. They
    become the same parameters, not only the same memory, so that they stay one when sharded over processes (ZeRO-3)."""
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
