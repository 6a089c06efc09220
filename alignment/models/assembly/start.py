"""Loads the model that a stage trains: the policy that it starts from, with the stage's adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel, TaskType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import PreTrainedModel

from alignment.config.model import CONTINUE, AdapterConfig, AdapterKind, Chain, Dtype
from alignment.core.errors import ConfigError
from alignment.models.assembly.adapters import add_adapter, add_frozen, is_prefix, on_embeddings, saved_config, train_on
from alignment.models.assembly.load import Lineage, SavedAdapter, load_policy, load_scalar, weights_dtype
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
    """The policy ``start``, ready to be trained with ``adapter``; under a scalar head for ``SEQ_CLS``.

    Adapters of earlier stages are merged into the weights or stay beside them, as configured by ``adapter.chain``.
    Weights in four bits are quantised on ``device``; the caller moves the rest. If the weights will be ``sharded`` and
    all are trained, they stay mapped until they are cut (mapped.py). Frozen weights in the compute dtype are mapped
    anyway.

    Raises:
        ConfigError: there is no adapter to continue, it has another shape, or adapters cannot stay beside the weights.
        ModelError: an adapter does not fit the model.
    """
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
    _refuse_whole_weights(beside, adapter)
    model = load(below, dtype)
    _refuse_unmerged(model, beside, adapter)
    _refuse_dora_in_four_bits(beside, adapter)
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
    trained whole, except the head of a reward model, and factors on the head or the embeddings.

    Raises:
        ConfigError: there is such an adapter.
    """
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


def _refuse_whole_weights(beside: Sequence[SavedAdapter], adapter: AdapterConfig) -> None:
    """Refuses an adapter that was trained on weights in four bits beside whole ones: that is another policy.

    Raises:
        ConfigError: there is such an adapter.
    """
    if beside and beside[-1].nf4 and adapter.kind is not AdapterKind.qlora:
        raise ConfigError(
            f"{beside[-1].path.name} was trained on weights in four bits, but adapter.kind is {adapter.kind.value!r} "
            f"and adapter.chain {adapter.chain.value!r}",
            where="adapter.chain",
            remedy="set it to merge, or use adapter=qlora",
        )


def _refuse_dora_in_four_bits(beside: Sequence[SavedAdapter], adapter: AdapterConfig) -> None:
    """Refuses DoRA beside weights in four bits, from whose packed bytes PEFT would compute its norms.

    Raises:
        ConfigError: there is such an adapter.
    """
    if adapter.kind is not AdapterKind.qlora:
        return
    for saved in beside:
        if getattr(saved_config(saved.path), "use_dora", False):
            raise ConfigError(
                f"{saved.path.name} is a DoRA adapter, which needs weights that are not in four bits, but "
                f"adapter.chain is {adapter.chain.value!r}",
                where="adapter.chain",
                remedy="set it to merge",
            )


def turn_off_dropout(model: nn.Module) -> None:
    """Turns dropout off permanently and in every mode: in the base model, in attention, and in loaded adapters."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            rates = [name for name, value in vars(holder).items() if _is_dropout(name, value)] if holder else []
            for name in rates:
                setattr(holder, name, 0.0)


def _is_dropout(name: str, value: object) -> bool:
    """``attention_dropout`` of Llama, ``hidden_dropout`` of Falcon, ``activation_dropout`` of XGLM."""
    return name.endswith("dropout") and isinstance(value, float)


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
