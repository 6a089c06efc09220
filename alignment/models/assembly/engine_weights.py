"""Writes a policy's weights for an engine: the folder that it starts from, and what follows after an update."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from alignment.config.model import CONTINUE, AdapterConfig, AdapterKind, Chain
from alignment.core.errors import ModelError
from alignment.models.assembly.adapters import OWN, is_prefix, merge_adapter, put_in_order, saved_config
from alignment.models.assembly.load import Lineage, load_policy
from alignment.models.kernels.nf4 import round_trunk


def write_base(start: Lineage, adapter: AdapterConfig, dtype: torch.dtype, folder: Path) -> Path:
    """The folder of the weights below the adapter that a stage trains, merged; for full training, of the start. It is
    that of the base if nothing has to be merged, else ``folder``, which is written."""
    if adapter.kind is AdapterKind.full:
        model = load_policy(start, dtype)
        return write_model(model, dict(model.named_parameters(remove_duplicate=False)), dtype, folder)
    below, beside = (start, ()) if adapter.chain is Chain.merge else (start.weights, start.beside)
    frozen = beside[:-1] if adapter.chain is CONTINUE else beside
    if not frozen and adapter.kind is not AdapterKind.qlora:
        return write_merged(below, dtype, folder)
    model = load_policy(below, dtype)
    if adapter.kind is AdapterKind.qlora:
        round_trunk(model)  # the frozen adapters beside it were never in four bits
    for saved in frozen:
        model = merge_adapter(model, saved.path)
    model.save_pretrained(str(folder))
    return folder


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedWeights:
    """A policy as an engine takes it: the lineage of weights that have to be merged, and at most one LoRA adapter.
    Policies with equal ``below`` can be served side by side. ``rank`` is the adapter's, 0 without one."""

    below: Lineage
    adapter: Path | None = None
    rank: int = 0


def served_weights(policy: Lineage, *, highest_rank: int) -> ServedWeights:
    """How an engine takes a policy: its topmost adapter apart if it is a plain LoRA adapter of at most this rank, else
    all merged. Raises ModelError: the policy has a prefix."""
    if any(is_prefix(adapter.path) for adapter in policy.adapters):
        raise ModelError("vLLM does not support prefix adapters", remedy="use sampling.engine=own")
    if len(policy.beside) == 1 and not policy.beside[0].nf4:
        saved = saved_config(policy.beside[0].path)
        if not saved.use_dora and not saved.modules_to_save and saved.r <= highest_rank:
            return ServedWeights(below=policy.weights, adapter=policy.beside[0].path, rank=saved.r)
    return ServedWeights(below=policy)


def write_merged(below: Lineage, dtype: torch.dtype, folder: Path) -> Path:
    """The folder of a lineage's merged weights: that of the base if there is nothing to merge, else ``folder``."""
    if not below.adapters:
        return below.base
    load_policy(below, dtype).save_pretrained(str(folder))
    return folder


def write_model(model: PreTrainedModel, state: Mapping[str, Tensor], dtype: torch.dtype, folder: Path) -> Path:
    """Writes all weights of ``state``, by their names in ``model``. The head is written apart from the embeddings even
    if both are one matrix: vLLM would replace only one of them."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    config.dtype = dtype
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    weights = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in state.items()}
    addresses: set[int] = set()
    for name, weight in weights.items():
        if weight.data_ptr() in addresses:
            weights[name] = weight.clone()
        addresses.add(weight.data_ptr())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_adapter(policy: PeftModel, state: dict[str, Tensor] | None, folder: Path) -> Path:
    """Writes the adapter that the policy trains; ``state`` holds its weights if they are sharded."""
    policy.save_pretrained(str(folder), selected_adapters=[OWN], state_dict=state)
    put_in_order(folder)
    return folder
